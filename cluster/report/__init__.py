"""The report: one HTML file about a dataset, a training run and a sweep, that needs nothing else to be read.

Gathering (dataset, gallery, throughput, run, captions, sweep) knows stores and no HTML; showing (html, charts, *_view,
page) knows no store; make puts both together.
"""
