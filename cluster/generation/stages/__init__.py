"""What happens to one shard: drawn, featurised, written - one callable, one module, one actor pool each.

A module for each, so that a worker imports only what its stage needs: seconds of start-up for diffusers or open_clip.
"""
