"""Takes the handling of each fault away, one at a time, and sees a test fail for it: `make mutants`.

A test of a fault that passes without the handling proves nothing. Every mutant is one replaced piece of source in a
copy of the tree; the tests named beside it must pass in the copy as it is, and fail (or hang) in the mutant. The last
line of stdout is JSON, and the exit status 1 if a mutant lives.

    python -m tests.chaos.mutants            # all
    python -m tests.chaos.mutants watchdog   # those whose name has this in it
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.paths import ROOT

LEFT_BEHIND = ("demo", "*.egg-info", "__pycache__", "dist", "build")  # and whatever begins with a dot
SECONDS = 240  # a mutant that takes longer hangs


@dataclass(frozen=True)
class Mutant:
    """A fault's handling, the source that holds it, what stands there without it, and the tests that must notice."""

    handling: str
    file: str
    source: str
    without: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "an index of other shards is not believed",
        "cluster/dataset/row_index.py", "if metadata.get(_SHARDS, b\"\").decode() != _binding(shards):", "if False:",
        ("tests/cluster/dataset/test_row_index.py::test_an_index_of_other_shards_is_not_believed",),
    ),
    Mutant(
        "a run is gone on with in the order in which it began",
        "cluster/training/run_document.py", 'if (order := previous.get("row_order", 1)) != ROW_ORDER:',
        'if (order := previous.get("row_order", 1)) < 0:',
        ("tests/cluster/training/test_train.py::test_a_run_of_another_row_order_is_refused",),
    ),
    Mutant(
        "featurise --data: a shard that is there is not made again",
        "cluster/ingest/another_clip.py", "        if shard_key(number) not in there or facts_key(number) not in facts\n", "",
        ("tests/cluster/ingest/test_another_clip.py::"
         "test_what_is_there_is_not_made_again_and_the_result_is_the_same",),
    ),
    Mutant(
        "featurise --data: a shard whose facts are gone is made again",
        "cluster/ingest/another_clip.py", " or facts_key(number) not in facts", "",
        ("tests/cluster/ingest/test_another_clip.py::test_a_damaged_manifest_is_mended_by_the_same_command",),
    ),
    Mutant(
        "featurise --data: of two that made a shard one stores it",
        "cluster/ingest/featurise_again.py", "if self._monitor is not None and not ask(", "if False and not ask(",
        ("tests/cluster/ingest/test_another_clip.py::test_of_two_that_made_a_shard_one_stores_it",),
    ),
    Mutant(
        "featurise --data: another device or precision is not mixed with what was begun",
        "cluster/ingest/another_clip.py",
        "if (begun.device, begun.dtype, begun.batch_size, begun.cpu_threads) != mine:", "if False:",
        ("tests/cluster/ingest/test_another_clip.py::test_another_clip_or_source_is_not_mixed_with_what_was_begun",),
    ),
    Mutant(
        "refine: features of another dataset do not find the pictures",
        "cluster/curation/refine.py", "if lineage.sources[0].sha256 != source.sha256:", "if False:",
        ("tests/cluster/curation/test_refine.py::test_only_the_same_dataset_by_another_clip_may_find_the_pictures",),
    ),
    Mutant(
        "redraw: what a budget buys is found once",
        "cluster/curation/redraw/view.py", "found = json.loads(out.read_bytes(REDRAW_PLAN_KEY))", "raise FileNotFoundError",
        ("tests/cluster/curation/test_redraw.py::test_what_a_budget_buys_is_found_once",),
    ),
    Mutant(
        "redraw: further attempts at one redraw meet no other redraw",
        "pcm/generation/seeds.py", "REDRAW_STEP * (int(attempt) - 1)", "(int(attempt) - 1)",
        ("tests/pcm/generation/test_redraw_seeds.py::"
         "test_redraws_of_a_sample_and_their_further_attempts_never_meet",),
    ),
    Mutant(
        "redraw: a picture that could not be made is not kept",
        "cluster/curation/redraw/view.py", "for redraw in np.flatnonzero(np.isfinite(drawn.score)).tolist():\n"
        "                row = int(drawn.redraws.row[redraw])\n"
        "                if drawn.score[redraw] > score[row]:",
        "for redraw in range(len(drawn.score)):\n"
        "                row = int(drawn.redraws.row[redraw])\n"
        "                if not drawn.score[redraw] <= score[row]:",
        ("tests/cluster/curation/test_redraw.py::"
         "test_a_redraw_that_cannot_be_made_is_counted_and_the_old_picture_stays",),
    ),
    Mutant(
        "redraw: a round of other redraws is not taken for this one",
        "cluster/curation/redraw/rounds.py", "if found.spec.differences(plan.spec) or found.asked() != replace(plan, spec=found.spec).asked():", "if False:",
        ("tests/cluster/curation/test_redraw.py::test_a_round_that_was_changed_from_outside_is_named",),
    ),
    Mutant(
        "redraw: a redrawn view is not given the pictures again that had lost",
        "cluster/curation/redraw/view.py", "before = attempts_before(source.manifest.lineage)", "before = 0",
        ("tests/cluster/curation/test_redraw.py::test_a_redraw_of_a_redraw_draws_other_pictures",),
    ),
    Mutant(
        "redraw: a caption that cannot be drawn does not take every round",
        "cluster/curation/redraw/scores.py", "np.add.at(failed, rows[~made], 1)", "pass",
        ("tests/cluster/curation/redraw/test_scores.py::"
         "test_a_caption_that_cannot_be_drawn_takes_no_more_than_one_round",),
    ),
    Mutant(
        "redraw, verify --redraw: another model draws nothing",
        "cluster/generation/picture_spec.py", "        if now != pinned:", "        if False:",
        ("tests/cluster/curation/redraw/test_own_generator.py::test_a_model_that_is_another_now_is_refused",),
    ),
    Mutant(
        "a generator that starts again refuses a model that was replaced",
        "cluster/generation/stages/draw.py", "        refuse_other_models(self._spec)\n", "",
        ("tests/cluster/generation/test_moved_models.py::"
         "test_a_process_that_starts_again_refuses_a_model_that_was_replaced",),
    ),
    Mutant(
        "verify: the seeds of redraws follow from their ids and captions",
        "cluster/dataset/shard_check.py",
        "if part[\"seed\"].to_pylist() != [redraw_seed(corpus_id, caption) for corpus_id, caption in named]:", "if False:",
        ("tests/cluster/curation/test_redraw.py::test_verify_finds_another_seed_in_a_rounds_plan",),
    ),
    Mutant(
        "generate --spec: a model that is another now is refused",
        "cluster/generation/like.py", "    if off:", "    if False:",
        ("tests/cluster/generation/test_like.py::test_a_model_that_is_another_now_is_refused",),
    ),
    Mutant(
        "verify --redraw: pictures that differ in the same environment are no success",
        "cluster/generation/redraw_compare.py", '"ok": not any(faults),', '"ok": True,',
        ("tests/cluster/generation/test_redraw_check.py::"
         "test_a_picture_that_differs_is_measured_and_is_no_success",),
    ),
    Mutant(
        "what float32 cannot tell apart is a candidate",
        "cluster/curation/sync/nearest.py", "    return float(unit / (1 - unit) * longest)", "    return -2 * UNIT",
        ("tests/cluster/curation/sync/test_nearest.py::test_the_nearest_are_those_of_brute_force",),
    ),
    Mutant(
        "a block that lies on the store is not made again",
        "cluster/curation/sync/objects.py", "tasks.run(function, missing, what=what, on_device=on_device)",
        "tasks.run(function, list(calls.values()), what=what, on_device=on_device)",
        ("tests/cluster/curation/sync/test_stages.py::test_an_interrupted_run_goes_on_where_it_was",),
    ),
    Mutant(
        "a sentence encoder's own code is refused by name",
        "cluster/curation/sync/sentences.py", "if package.partition(\".\")[0] != _PACKAGE or part not in _PARTS:", "if False:",
        ("tests/cluster/curation/sync/test_sentences.py::test_python_of_a_models_own_is_refused_by_name",),
    ),
    Mutant(
        "an object of other bytes is no part of a copy of weights",
        "cluster/weights/node_copy.py", "    if found != file.sha256:", "    if False:",
        ("tests/cluster/weights/test_node_copy.py::test_a_harmed_object_is_refused_and_mended_by_staging_again",),
    ),
    Mutant(
        "other weights than were pinned are not fetched",
        "cluster/weights/node_copy.py", "    if manifest.revision != revision:", "    if False:",
        ("tests/cluster/weights/test_node_copy.py::test_other_weights_than_pinned_are_refused",),
    ),
    Mutant(
        "one process of a machine fetches weights at a time",
        "cluster/weights/node_copy.py", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
        ("tests/cluster/weights/test_node_copy.py::test_two_processes_make_one_copy",),
    ),
    Mutant(
        "a CLIP's configuration may say only what is on the list",
        "pcm/clip/configuration.py", "if name not in allowed:", "if False:",
        ("tests/pcm/clip/test_configuration.py::test_what_is_not_on_the_list_is_refused_by_name",),
    ),
    Mutant(
        "a pipeline's own code is refused by name",
        "pcm/generation/own_code.py", "if not known:", "if False:",
        ("tests/pcm/generation/test_own_code.py",),
    ),
    Mutant(
        "a checkpoint alone names no CLIP by folder",
        "pcm/captioners/captioner.py", "if not clip and name != named_by_run:", "if False:",
        ("tests/pcm/captioners/test_captioner.py::test_a_checkpoint_alone_cannot_have_a_folder_opened",),
    ),
    Mutant(
        "a key stays in its folder",
        "cluster/store/paths.py", 'part in ("", ".", "..")', 'part in ("",)',
        ("tests/cluster/store/test_store.py::test_a_key_that_leads_out_of_a_folder_is_refused",),
    ),
    Mutant(
        "a pickle that means many more values than it holds is refused",
        "pcm/safe_pickle/values.py", "if meaning > self._limit:", "if False:",
        ("tests/pcm/safe_pickle/test_safe_pickle.py::test_lists_that_double_are_refused",),
    ),
    Mutant(
        "keys whose hashes can be chosen are refused",
        "pcm/safe_pickle/values.py", "if sum(not isinstance(part, (str, bytes)) for part in parts) > 1:", "if False:",
        ("tests/pcm/safe_pickle/test_safe_pickle.py::test_keys_whose_hashes_can_be_chosen_are_refused",),
    ),
    Mutant(
        "a torch file that inflates is refused",
        "pcm/safe_pickle/torch_files.py", "if held > size:", "if False:",
        ("tests/pcm/safe_pickle/test_torch_files.py::test_a_file_that_inflates_is_refused_before_it_is_read",),
    ),
    Mutant(
        "gzip that grows without end is refused",
        "pcm/text/gzip_files.py", "if self._given > FREE_BYTES + LARGEST_RATIO * self._raw.tell():", "if False:",
        ("tests/pcm/text/test_gzip_files.py::test_gzip_that_grows_without_end_is_refused",),
    ),
    Mutant(
        "a job that does not unwind is ended",
        "jobs/endings.py", "deadline.start()", "pass",
        ("tests/jobs/test_endings.py::test_a_stopped_job_ends_with_its_status_one_line_and_no_orphan",),
    ),
    Mutant(
        "a full stdout does not undo a finished job",
        "jobs/endings.py", "        discard(STDOUT.stream)\n", "        raise\n",
        ("tests/jobs/test_endings.py::test_streams_that_nobody_reads_change_no_status",),
    ),
    Mutant(
        "what Ray prints is not on stdout",
        "jobs/endings.py", "        sys.stdout = sys.stderr\n", "",
        ("tests/jobs/test_endings.py::test_what_ray_prints_is_not_on_stdout",),
    ),
    Mutant(
        "a view that moved with its source finds it",
        "cluster/dataset/documents.py", "located(store, each, documents=(MANIFEST_KEY, PLAN_KEY)) for each", "each for each",
        ("tests/cluster/dataset/test_beside.py",),
    ),
    Mutant(
        "names and captions are UTF-8 whatever the locale",
        "jobs/command_line.py", "        use_utf8()\n", "",
        ("tests/jobs/test_endings.py::test_names_and_captions_are_utf_8_whatever_the_locale",),
    ),
    Mutant(
        "as many open files as Ray recommends are allowed",
        "cluster/session.py", "        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))", "        pass",
        (
            "tests/cluster/test_session.py::"
            "test_as_many_open_files_as_ray_recommends_are_allowed_and_a_low_limit_is_named",
        ),
    ),
    Mutant(
        "a full disk for temporary files is named",
        "cluster/store/temporary.py", "if not _is_full(error):", "if True:",
        ("tests/cluster/training/test_checkpoints.py::test_a_temporary_disk_that_is_full_is_named",),
    ),
    Mutant(
        "a clock that is set changes no rate",
        "cluster/generation/progress.py", "return lambda: offset + time.monotonic()",
        "return lambda: time.time()",
        ("tests/cluster/generation/test_progress.py::test_a_clock_that_is_set_during_a_run_changes_no_rate",),
    ),
    Mutant(
        "times that a clock took which was set back count for nothing",
        "cluster/report/throughput.py", "max(0.0, shard.get(f\"{stage}_seconds\", 0.0))",
        "shard.get(f\"{stage}_seconds\", 0.0)",
        ("tests/cluster/report/test_throughput.py::test_a_machine_whose_clock_is_a_day_off_makes_no_rate_negative",),
    ),
    Mutant(
        "a disk that is mounted read-only is one line",
        "cluster/store/retries.py", "frozenset({errno.EACCES, errno.EPERM, errno.EROFS})", "frozenset({errno.EACCES})",
        (
            "tests/cluster/store/test_retries.py::"
            "test_a_disk_that_is_full_or_read_only_at_the_manifest_costs_no_shard",
        ),
    ),
    Mutant(
        "a local Ray listens on the loopback alone",
        "cluster/__init__.py", 'os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")', "pass",
        ("tests/cluster/test_session.py::test_a_local_ray_listens_on_the_loopback_alone_writes_no_token_and_is_silent",),
    ),
    Mutant(
        "parts of a corpus are in the order of their names, whatever a listing's is",
        "cluster/store/store.py",
        "return sorted(self._with_retries(prefix, lambda: [key for key in self._find(prefix) if _is_object(key)]))",
        "return self._with_retries(prefix, lambda: [key for key in self._find(prefix) if _is_object(key)])",
        ("tests/cluster/sources/test_corpus_parts.py::test_the_order_of_a_listing_changes_neither_digest_nor_records",),
    ),
    Mutant(
        "a store that answers 503, hangs or cuts is tried again",
        "cluster/store/retries.py", 'if fault.kind != "transient" and not late:', "if True:",
        ("tests/cluster/store/test_retries.py::test_a_fault_that_passes_is_tried_again",),
    ),
    Mutant(
        "what a killed process left in the folder for temporary files is deleted",
        "cluster/store/temporary.py", "            shutil.rmtree(path)\n", "            pass\n",
        ("tests/cluster/store/test_temporary.py::"
         "test_what_a_killed_process_left_is_deleted_after_a_day_and_what_is_in_use_is_not",),
    ),
    Mutant(
        "what a process holds in the folder for temporary files is no leftover",
        "cluster/store/temporary.py", "        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "",
        ("tests/cluster/store/test_temporary.py::"
         "test_what_a_killed_process_left_is_deleted_after_a_day_and_what_is_in_use_is_not",),
    ),
    Mutant(
        "a client that was made without credentials looks for them again",
        "cluster/store/store.py", "            self._single.connect(refresh=True)\n", "            pass\n",
        ("tests/cluster/store/test_store_failures.py::"
         "test_credentials_that_a_metadata_service_gives_too_late_are_asked_for_again",),
    ),
    Mutant(
        "a store that restarts is waited for",
        "cluster/store/retries.py", "if (left := patience.left()) <= 0:", "if (left := 0.0) <= 0:",
        ("tests/cluster/store/test_retries.py::test_a_store_that_restarts_is_waited_for",),
    ),
    Mutant(
        "a hub that fails is asked again",
        "cluster/store/retries.py", 'if fault.kind != "transient" or (left := patience.left()) <= 0:', "if left := 1.0:",
        ("tests/cluster/store/test_load_with_retries.py::test_a_hub_that_fails_twice_is_asked_again",),
    ),
    Mutant(
        "a slow run is no failed one",
        "cluster/session.py", "context.execution_no_progress_timeout_s = -1", "pass",
        ("tests/cluster/store/test_load_with_retries.py::test_ray_data_ends_no_run_for_being_slow",),
    ),
    Mutant(
        "a full disk is one line",
        "cluster/store/retries.py", "frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})", "frozenset()",
        ("tests/cluster/store/test_retries.py::test_a_full_disk_is_one_line_and_nothing_is_half_written",),
    ),
    Mutant(
        "a corpus is read through faults of its store that pass",
        "cluster/store/store.py",
        "lambda start, end: self._with_retries(key, lambda: self._single.cat_file(path, start=start, end=end)),",
        "lambda start, end: self._single.cat_file(path, start=start, end=end),",
        ("tests/cluster/store/test_open.py::test_a_corpus_is_read_through_faults_that_pass",),
    ),
    Mutant(
        "an object that is replaced while it is read is not read as a mixture",
        "cluster/store/object_file.py", "if self._version() != self.opened:", "if False:",
        ("tests/cluster/store/test_open.py::test_an_object_that_is_replaced_while_it_is_read_is_noticed_at_its_end",),
    ),
    Mutant(
        "a credential before the @ of an address is refused",
        "pcm/credentials.py", 'if at and (":" in name or protocol.lower() not in _NAME_BEFORE_AT):', "if False:",
        ("tests/pcm/test_credentials.py",),
    ),
    Mutant(
        "a credential among the parameters of a URI is refused",
        "pcm/credentials.py", "return any(map(_is_secret, _PARAMETER.findall(rest)))", "return False",
        ("tests/pcm/test_credentials.py",),
    ),
    Mutant(
        "a credential that is percent-encoded is refused",
        "pcm/credentials.py", "{uri, unquote(uri), unquote(unquote(uri))}", "{uri}",
        ("tests/pcm/test_credentials.py",),
    ),
    Mutant(
        "the store opens no URI that carries a credential",
        "cluster/store/store.py", "    refuse_credentials(uri)\n", "",
        ("tests/cluster/store/test_open.py::test_no_way_in_takes_a_credential",),
    ),
    Mutant(
        "no plan records a URI that carries a credential",
        "cluster/dataset/plan.py", "    refuse_credentials(corpus)  # it goes into the plan and the manifest\n", "",
        ("tests/cluster/dataset/test_plan.py::test_a_corpus_whose_name_carries_a_credential_is_not_planned",),
    ),
    Mutant(
        "a local object appears whole or not at all",
        "cluster/store/store.py", 'with open(temporary, "wb") as file:', 'with open(path, "wb") as file:',
        ("tests/cluster/store/test_store.py::test_a_failed_write_leaves_the_old_object_and_nothing_else",),
    ),
    Mutant(
        "a shard cut short on the store is found",
        "cluster/dataset/shard_check.py", 'report.damage(f"{key}: unreadable ({first_line(error)})")', "pass",
        ("tests/cluster/generation/test_repair.py::test_exactly_what_is_damaged_is_made_again",),
    ),
    Mutant(
        "a shard with other bytes than the manifest says is found",
        "cluster/dataset/shard_check.py", 'report.sha256 != said', "False",
        ("tests/cluster/dataset/test_verify.py::test_a_manifest_of_other_shards_is_found",),
    ),
    Mutant(
        "a damaged part of the list of shards is not believed",
        "cluster/dataset/documents.py", 'if hashlib.sha256(data).hexdigest() != part["sha256"]:', "if False:",
        (
            "tests/cluster/dataset/test_manifest_parts.py"
            "::test_a_part_that_is_damaged_or_missing_is_named_in_one_line_and_repaired",
        ),
    ),
    Mutant(
        "the parts of a manifest are there before it",
        "cluster/dataset/documents.py", "    parts = []\n    for start", "    store.write_bytes(MANIFEST_KEY, manifest.to_json())\n    parts = []\n    for start",
        (
            "tests/cluster/dataset/test_manifest_parts.py"
            "::test_a_driver_killed_while_it_writes_the_manifest_leaves_an_unfinished_dataset_that_is_finished",
        ),
    ),
    Mutant(
        "a picture of a view that is gone is counted",
        "cluster/dataset/verify_derived.py", "                report.missing += len(places)\n", "",
        ("tests/cluster/dataset/test_view.py::test_verify_names_a_source_that_has_changed_or_is_gone",),
    ),
    Mutant(
        "a view that was interrupted is finished by the command that began it, and by no other",
        "cluster/dataset/derived.py", "    if found != document:\n", "    if False:\n",
        ("tests/cluster/dataset/test_view.py::test_what_was_interrupted_is_finished_by_the_same_rows_alone",),
    ),
    Mutant(
        "all workers train on the shards of an unfinished dataset that the driver found",
        "cluster/training/data/mixture.py", "    if source.manifest is not None:\n", "    if False:\n",
        ("tests/cluster/dataset/test_view.py::test_the_shards_of_an_unfinished_dataset_are_pinned_for_all_workers",),
    ),
    Mutant(
        "out of memory: the batch halves",
        "pcm/generation/isolation.py", "elif is_out_of_memory(outcome):", "elif False:",
        ("tests/pcm/generation/test_isolation.py::test_too_little_memory_halves_the_batch_for_good_and_the_rows_say_so",),
    ),
    Mutant(
        "out of memory: the rows say in how large a batch they were drawn, and are drawn again so",
        "cluster/generation/stages/draw.py", '_OF_DRAWING = ("attempts", "batch_size",',
        '_OF_DRAWING = ("attempts", "attempts",',
        ("tests/cluster/generation/test_model_faults.py::test_rows_drawn_in_a_smaller_batch_say_so_and_are_drawn_again_in_it",),
    ),
    Mutant(
        "out of memory: CLIP's batch halves",
        "cluster/generation/stages/featurise.py", "if is_out_of_memory(error) else 0", "if False else 0",
        ("tests/cluster/generation/stages/test_featurise.py::test_too_little_memory_halves_clips_batches_and_the_stats_say_so",),
    ),
    Mutant(
        "a caption on which the generator raises is quarantined alone",
        "pcm/generation/isolation.py", "elif len(indices) > 1:", "elif False:",
        ("tests/pcm/generation/test_isolation.py::test_a_caption_that_raises_is_refused_and_its_neighbours_are_drawn",),
    ),
    Mutant(
        "a picture that cannot be encoded is quarantined alone",
        "pcm/generation/isolation.py", "        except Exception as error:\n            guard.failed((request,)",
        "        except ZeroDivisionError as error:\n            guard.failed((request,)",
        ("tests/pcm/generation/test_isolation.py::test_a_picture_that_cannot_be_encoded_is_refused_alone",),
    ),
    Mutant(
        "a picture on which CLIP raises is quarantined alone",
        "cluster/generation/stages/featurise.py", "elif len(batch) > 1:", "elif False:",
        ("tests/cluster/generation/stages/test_featurise.py::test_a_picture_on_which_clip_raises_is_quarantined_alone",),
    ),
    Mutant(
        "watchdog: a batch that hangs ends its process",
        "cluster/generation/stages/watchdog.py", "faulthandler.dump_traceback_later(seconds, exit=True, file=file)", "pass",
        ("tests/cluster/generation/test_model_faults.py::test_captions_that_raise_crash_hang_or_break_are_quarantined_and_no_other",),
    ),
    Mutant(
        "a caption over which processes die is given up",
        "cluster/generation/stages/monitor.py", "            suspect.deaths += 1\n", "",
        ("tests/cluster/generation/stages/test_monitor.py::test_who_was_in_a_batch_at_a_death_is_drawn_alone_and_given_up_after_the_third",),
    ),
    Mutant(
        "suspects are drawn alone",
        "pcm/generation/isolation.py", "if suspicion]", "if False]",
        ("tests/pcm/generation/test_isolation.py::test_suspects_are_drawn_alone_and_first_and_the_refused_not_at_all",),
    ),
    Mutant(
        "a process that can draw nothing any more refuses no caption",
        "pcm/generation/isolation.py", "                self._blame(outcome, slots.values(), guard)\n", "",
        ("tests/pcm/generation/test_isolation.py::test_a_process_that_can_draw_nothing_any_more_refuses_no_caption",),
    ),
    Mutant(
        "a generator that never draws is left out",
        "cluster/generation/stages/monitor.py", "if generator.fruitless_starts >= max(MAX_FRUITLESS_STARTS, self._policy.max_deaths + 1):",
        "if False:",
        ("tests/cluster/generation/stages/test_monitor.py::test_a_generator_that_never_draws_is_left_out_and_the_last_one_of_them_stops_the_run",),
    ),
    Mutant(
        "the run waits for generators that have not started yet",
        "cluster/generation/stages/monitor.py", "if others > 0 and self._clock()",
        "if False and self._clock()",
        ("tests/cluster/generation/stages/test_monitor.py::test_the_run_waits_for_generators_that_have_not_started_before_it_says_that_none_can_draw",),
    ),
    Mutant(
        "generators that start again leave a place for CLIP alone",
        "cluster/generation/pools.py", "generator_cpus=_that_never_fills(share)", "generator_cpus=share",
        ("tests/cluster/generation/test_pools.py::test_generators_never_fill_a_machine",),
    ),
    Mutant(
        "a shard that was begun before is drawn once nothing is left to store",
        "cluster/generation/stages/generator.py", "if turn.again:", "if False:",
        ("tests/cluster/generation/stages/test_generator.py::test_a_shard_that_was_begun_before_is_drawn_once_nothing_is_left_to_store",),
    ),
    Mutant(
        "what a dead process was storing may be stored by another",
        "cluster/generation/stages/claims.py", "                del self._writing[shard]\n", "                pass\n",
        ("tests/cluster/generation/stages/test_monitor.py::test_what_a_process_was_storing_is_lost_with_it_unless_clip_alone_has_it",),
    ),
    Mutant(
        "there are turns for all that is bound to generators that are lost",
        "cluster/generation/pools.py", "bound = TURNS_AT_ONCE * min(", "bound = min(",
        ("tests/cluster/generation/stages/test_generator.py::test_the_one_generator_that_can_draw_draws_everything",),
    ),
    Mutant(
        "there are turns for all that actors of CLIP give back that cannot load it",
        "cluster/generation/pools.py", " + CALLS * min(self.scorers, shards)", "",
        ("tests/cluster/generation/stages/test_scorer.py::test_the_one_actor_of_clip_that_can_load_it_scores_everything",),
    ),
    Mutant(
        "a run that the driver ends frees its actors",
        "cluster/generation/pipeline.py", "with closing(made):", "if True:",
        ("tests/cluster/generation/stages/test_generator.py::test_an_error_of_the_driver_holds_no_cpus_whoever_keeps_it",),
    ),
    Mutant(
        "what a lost process had is the next to be drawn",
        "cluster/generation/stages/claims.py", "        if lost:\n            return min(lost)\n",
        "",
        ("tests/cluster/generation/stages/test_monitor.py::test_what_a_dead_process_had_is_the_next_to_be_drawn_by_whoever_asks",),
    ),
    Mutant(
        "a monitor whose process died is told what is left",
        "cluster/generation/attendant.py", "if wants_pass:", "if False:",
        ("tests/cluster/generation/test_attendant.py::test_a_monitor_whose_process_died_gives_out_what_is_left_and_in_nobodys_hand",),
    ),
    Mutant(
        "a monitor whose process died hears who is left out",
        "cluster/generation/stages/loading.py", "            self.say_left_out()\n            return\n", "            return\n",
        ("tests/cluster/generation/test_attendant.py::test_a_generator_that_was_left_out_before_the_monitors_process_died_still_ends_the_run",),
    ),
    Mutant(
        "a monitor whose process died takes nobody for lost who may be at work",
        "cluster/generation/stages/monitor.py", "        if self._claims.some_are_out_with_unknown:\n", "        if False:\n",
        ("tests/cluster/generation/stages/test_monitor.py::test_a_monitor_that_starts_again_takes_nobody_for_lost_who_may_be_at_work",),
    ),
    Mutant(
        "an actor of CLIP that takes turns is known to a monitor whose process died",
        "cluster/generation/stages/monitor.py", "        if scores:\n            self._heard_of_scorer(generator)\n", "",
        ("tests/cluster/generation/stages/test_monitor.py::test_an_actor_of_clip_that_takes_turns_is_known_to_a_monitor_that_starts_again",),
    ),
    Mutant(
        "the monitor is told which nodes are there",
        "cluster/generation/attendant.py", "monitor.nodes.remote(cluster_nodes(labels))", "pass",
        ("tests/cluster/generation/test_attendant.py::test_what_was_in_hand_on_a_node_that_is_gone_is_given_out_again",),
    ),
    Mutant(
        "a run in which nobody can draw waits for nodes that are coming",
        "cluster/generation/stages/monitor.py", "waits for it.\"\"\"\n        self._last_hope = self._clock()\n", "waits for it.\"\"\"\n",
        ("tests/cluster/generation/stages/test_monitor.py::test_the_run_waits_as_long_as_nodes_are_coming_and_says_for_what",),
    ),
    Mutant(
        "what an actor of CLIP cannot score is drawn again, for another",
        "cluster/generation/stages/claims.py", "            self._claims[taken.shard] = replace(claim, since=-math.inf)\n",
        "            pass\n",
        ("tests/cluster/generation/stages/test_monitor.py::test_an_actor_of_clip_that_cannot_load_it_gives_its_shards_back_and_only_the_last_one_stops_the_run",),
    ),
    Mutant(
        "a caption that takes its node along is drawn alone",
        "cluster/generation/stages/monitor.py", "                self._bury(known, known.broken, \"\")\n", "                pass\n",
        ("tests/cluster/generation/stages/test_monitor.py::test_a_batch_on_a_node_that_is_lost_is_a_death_before_another_generator_draws_it",),
    ),
    Mutant(
        "a turn whose row Ray has is for no other shard",
        "cluster/generation/stages/monitor.py", "        elif self._claims.is_used(number):\n            return Turn()\n", "",
        ("tests/cluster/generation/stages/test_monitor.py::test_a_turn_of_which_something_may_have_come_out_is_for_no_other_shard",),
    ),
    Mutant(
        "a shard is lost with who stores it, whoever else drew it",
        "cluster/generation/stages/claims.py", "            if winner in self._turns and (claim := self._claims.get(shard)) is not None:",
        "            if False:",
        ("tests/cluster/generation/stages/test_monitor.py::test_who_draws_a_shard_that_another_stores_loses_it_and_it_is_given_out_when_that_one_dies",),
    ),
    Mutant(
        "a late shard is given out again",
        "cluster/generation/stages/claims.py", "if claim.since <= late and not claim.is_second]",
        "if claim.since > math.inf]",
        ("tests/cluster/generation/stages/test_monitor.py::test_a_late_shard_is_given_out_again_at_the_end",),
    ),
    Mutant(
        "two draw a late shard at most",
        "cluster/generation/stages/claims.py", "<= late and not claim.is_second]", "<= late]",
        ("tests/cluster/generation/stages/test_monitor.py::test_a_caption_that_hangs_in_the_last_shard_is_given_up_and_the_run_goes_on",),
    ),
    Mutant(
        "a late shard that is being stored is not drawn again",
        "cluster/generation/stages/claims.py", "(shard for shard in alone if self._storing(shard) is None)", "alone",
        ("tests/cluster/generation/stages/test_monitor.py::test_a_late_shard_that_is_being_stored_is_not_drawn_again",),
    ),
    Mutant(
        "of two drawers of a shard one is stored",
        "cluster/generation/stages/claims.py", "if (winner := self._storing(shard)) not in (None, turn):",
        "if (winner := None):",
        ("tests/cluster/generation/stages/test_generator.py::test_of_two_that_drew_a_shard_one_is_stored_whole",),
    ),
    Mutant(
        "a model that is not loaded ends nothing",
        "cluster/generation/stages/loading.py", "        except Exception as error:\n",
        "        except ZeroDivisionError as error:\n",
        ("tests/cluster/generation/stages/test_generator.py::test_one_generator_that_cannot_load_its_model_ends_nothing",),
    ),
    Mutant(
        "a store that does not answer while weights are fetched leaves nobody out at once",
        "cluster/generation/stages/loading.py", "isinstance(error, OneLineError) and not error.passes",
        "isinstance(error, InputError)",
        ("tests/cluster/generation/stages/test_loading.py",),
    ),
    Mutant(
        "too large a share of failures stops the run",
        "cluster/generation/stages/monitor.py", "failed > self._policy.max_error_share * tried", "False",
        ("tests/cluster/generation/stages/test_monitor.py::test_too_large_a_share_of_failures_stops_the_run",),
    ),
    Mutant(
        "what fails after days stops the run",
        "cluster/generation/stages/monitor.py", "at_least=RECENT_SAMPLES)", "at_least=tried + 1)",
        ("tests/cluster/generation/stages/test_monitor.py::test_what_fails_after_days_stops_the_run",),
    ),
    Mutant(
        "blank pictures stop the run",
        "cluster/generation/stages/draw.py", "self._guard.end_shard(None if retry else drawn)",
        "self._guard.end_shard(None)",
        ("tests/cluster/generation/stages/test_generator.py::test_blank_pictures_are_told_as_failures_but_not_of_a_retry",),
    ),
    Mutant(
        "a shard that no process finishes stops the run",
        "cluster/generation/stages/monitor.py", "if self._starts[shard] - self._policy.max_deaths * len(refused) > MAX_SHARD_STARTS:",
        "if False:",
        ("tests/cluster/generation/stages/test_monitor.py::test_a_shard_that_no_process_finishes_stops_the_run",),
    ),
    Mutant(
        "a generator does not run ahead of the store",
        "cluster/generation/stages/monitor.py", "if self._claims.in_hand(generator) >= MAX_IN_HAND and", "if False and",
        ("tests/cluster/generation/stages/test_monitor.py::test_a_generator_does_not_run_ahead_of_the_store",),
    ),
    Mutant(
        "what is on the store is not drawn again",
        "cluster/generation/pipeline.py", "return [shard for shard in wanted if shard in again or shard not in there]",
        "return list(wanted)",
        ("tests/cluster/generation/test_generate.py::test_a_rerun_skips_everything",),
    ),
    Mutant(
        "who waits long for an answer sends something",
        "cluster/generation/stages/asking.py", "            monitor.busy.remote()", "            pass",
        ("tests/cluster/generation/stages/test_asking.py::test_who_waits_long_sends_something_and_gets_the_answer",),
    ),
    Mutant(
        "a second run on the cluster waits for the first",
        "cluster/only_job.py", "start(name=_name(store), namespace=_NAMESPACE)", "start()",
        ("tests/cluster/generation/test_two_runs.py::test_a_second_run_waits_and_draws_nothing_again",),
    ),
    Mutant(
        "a run waits for a retry that has taken the manifest away",
        "cluster/generation/pipeline.py", " or (shards is None and find_whole_manifest(store) is None)", "",
        ("tests/cluster/generation/test_two_runs.py::test_a_run_waits_for_a_retry_though_every_shard_is_there",),
    ),
    Mutant(
        "jobs with a Ray of their own each meet at the folder",
        "cluster/only_job.py", "fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
        ("tests/cluster/test_only_job.py::test_a_job_with_a_ray_of_its_own_is_met_at_the_folder",),
    ),
    Mutant(
        "a run that another job has begun meanwhile is not begun anew",
        "cluster/training/train.py", "        _refuse_what_changed(out, previous, resume=request.resume)\n", "",
        ("tests/cluster/training/test_train.py::test_a_run_that_another_job_has_begun_meanwhile_is_not_begun_anew",),
    ),
    Mutant(
        "what another run has stored meanwhile is not drawn again",
        "cluster/generation/pipeline.py", "            on_store = committed(store, plan)  # another run may just have ended\n", "",
        ("tests/cluster/generation/test_two_runs.py::test_a_second_run_waits_and_draws_nothing_again",),
    ),
    Mutant(
        "a shard that was lost is made again",
        "cluster/dataset/committed.py", "listed = len(groups) <= LISTED_GROUPS", "listed = False",
        ("tests/cluster/dataset/test_committed.py::test_few_groups_are_listed_all_the_same_and_a_lost_shard_is_found",),
    ),
    Mutant(
        "the shards of another dataset are not believed",
        "cluster/dataset/committed.py", 'if document["plan"] != _binding(plan, group):', "if False:",
        ("tests/cluster/dataset/test_committed.py::test_a_group_object_of_another_dataset_is_not_believed",),
    ),
    Mutant(
        "another spec on the same output is refused",
        "cluster/dataset/plan.py", "        refuse_other_spec(store, planned, spec, shard_size)\n", "",
        ("tests/cluster/dataset/test_plan.py::test_a_resume_that_asks_for_something_else_is_refused_and_changes_nothing",),
    ),
    Mutant(
        "CSV: a quote that nobody closes swallows no line",
        "pcm/text/csv_records.py", "if alike and not self._proven:", "if False:",
        ("tests/cluster/sources/test_files_as_people_have_them.py::test_two_stray_quotes_do_not_join_lines_that_are_records_by_themselves",),
    ),
    Mutant(
        "TSV: quotes are characters without proof",
        "pcm/text/csv_records.py", 'self._literal = self.quoting == "none" or (self.delimiter == "\\t" and not self._proven)',
        'self._literal = self.quoting == "none"',
        ("tests/cluster/sources/test_files_as_people_have_them.py::test_a_tsv_whose_captions_are_in_quotes_keeps_them_without_proof",),
    ),
    Mutant(
        "a caption line without end does not fill the memory",
        "pcm/text/caption_rows.py", "rest = stream.readline(MAX_LINE_BYTES)", "break",
        ("tests/cluster/sources/test_files_as_people_have_them.py::test_an_endless_line_is_cut_and_the_next_record_is_read",),
    ),
    Mutant(
        "ids that pandas made floats are whole numbers",
        "pcm/text/caption_rows.py", 'whole = text.removesuffix(".0")', "whole = text",
        (
            "tests/cluster/sources/test_files_as_people_have_them.py::"
            "test_ids_that_pandas_made_floats_are_whole_numbers",
        ),
    ),
    Mutant(
        "what macOS keeps beside pictures is no picture",
        "cluster/sources/pictures.py", 'return path.name.startswith("._") or "__MACOSX" in path.parts', "return False",
        ("tests/cluster/sources/test_pictures.py::test_what_macos_keeps_beside_pictures_is_left_out_and_said",),
    ),
    Mutant(
        "a container that is not there on Azure is named",
        "cluster/store/retries.py", 'if code in ("NoSuchBucket", "ContainerNotFound"):', 'if code == "NoSuchBucket":',
        ("tests/cluster/store/test_retries.py::test_errors_of_azure_are_told_apart_by_status_and_code",),
    ),
    Mutant(
        "a picture is turned upright",
        "pcm/images.py", "_upright(image)", "image",
        ("tests/pcm/test_images.py::test_a_picture_is_turned_upright_as_its_camera_says",),
    ),
    Mutant(
        "only the formats we promise are parsed",
        "pcm/images.py", "Image.open(opened, formats=OPENED_FORMATS)", "Image.open(opened)",
        ("tests/pcm/test_images.py::test_postscript_reaches_no_interpreter",),
    ),
    Mutant(
        "a picture that would become gigabytes is refused",
        "pcm/images.py", "if max(width, height) > MAX_ASPECT_RATIO * min(width, height):", "if False:",
        ("tests/pcm/test_images.py::test_a_sliver_is_refused_by_its_header",),
    ),
    Mutant(
        "one bad reference does not end an evaluation",
        "pcm/text/references.py", "            left_out[reason] += 1\n", '            raise InputError(f"{path}: {reason}")\n',
        ("tests/pcm/text/test_references.py::test_references_that_cannot_be_used_are_left_out_and_counted",),
    ),
    Mutant(
        "a corpus that did not only grow is refused",
        "cluster/dataset/plan.py", "        _refuse_other_corpus(store, planned, records, corpus, fingerprint)\n", "",
        ("tests/cluster/dataset/test_plan.py::test_a_corpus_that_did_not_only_grow_is_refused",),
    ),
    Mutant(
        "two drivers that plan different growth do not mix their plans",
        "cluster/dataset/plan.py", "if found != planned:", "if False:",
        ("tests/cluster/dataset/test_plan.py::test_two_drivers_that_plan_different_growth_do_not_mix_their_plans",),
    ),
    Mutant(
        "of two drivers that plan different things at one moment one gives up",
        "cluster/dataset/plan.py", "        if others:\n", "        if False:\n",
        (
            "tests/cluster/dataset/test_plan.py::"
            "test_of_two_drivers_that_plan_different_things_at_one_moment_one_plans_and_nothing_mixes",
        ),
    ),
    Mutant(
        "plan parts of another run lie elsewhere",
        "cluster/dataset/plan.py", 'return f"{PARTS}{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]}"',
        'return "plan"',
        (
            "tests/cluster/dataset/test_plan.py::"
            "test_of_two_drivers_that_plan_different_things_at_one_moment_one_plans_and_nothing_mixes",
        ),
    ),
    Mutant(
        "a damaged newest checkpoint is passed over",
        "cluster/training/checkpoints.py", "for earlier in self._earlier_than(name):", "for earlier in ():",
        (
            "tests/cluster/training/test_train.py::"
            "test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before",
        ),
    ),
    Mutant(
        "a disk's error that is not known is no missing object",
        "cluster/store/retries.py", 'if fault.kind == "other" and not _is_of_the_store(error):',
        'if fault.kind == "other":',
        ("tests/cluster/store/test_retries.py::test_any_other_error_of_a_disk_is_one_line_and_no_missing_object",),
    ),
    Mutant(
        "Ray deletes no other run's checkpoints",
        "cluster/training/ray_storage.py", "self._store.delete_folder(self._key(path))",
        "self.fs.rm(path, recursive=True)",
        ("tests/cluster/training/test_ray_storage.py::test_checkpoints_of_no_other_run_are_deleted",),
    ),
    Mutant(
        "the last file of a checkpoint says that it is whole",
        "cluster/training/checkpoints.py", "(file.name == STATE_FILE, file.name)", "(file.name != STATE_FILE, file.name)",
        (
            "tests/cluster/training/test_checkpoints.py::"
            "test_a_checkpoint_that_the_disk_does_not_take_is_one_line_and_none",
        ),
    ),
    Mutant(
        "too little memory is no damaged checkpoint",
        "cluster/training/checkpoints.py", "if is_out_of_memory(error):", "if False:",
        ("tests/cluster/training/test_checkpoints.py::test_too_little_memory_is_no_damage",),
    ),
    Mutant(
        "a store that stutters is no damaged checkpoint",
        "cluster/training/checkpoints.py", "return with_retries(lambda: self._load(folder), place=place)",
        "return self._load(folder)",
        ("tests/cluster/training/test_checkpoints.py::test_a_store_that_stutters_is_tried_again",),
    ),
    Mutant(
        "rows that are no numbers are named with their shard",
        "cluster/dataset/rows.py", "    return ~finite\n", "    return finite & False\n",
        (
            "tests/cluster/training/data/test_shuffled.py::"
            "test_rows_that_are_no_numbers_are_found_in_their_batch_with_their_shard",
        ),
    ),
    Mutant(
        "held-out rows that are no numbers are not captioned",
        "cluster/training/validation.py", "if bad.any():", "if False:",
        (
            "tests/cluster/training/data/test_shuffled.py::"
            "test_held_out_rows_that_are_no_numbers_are_named_before_they_are_captioned",
        ),
    ),
    Mutant(
        "deep JSON in a dataset's documents is damage",
        "cluster/dataset/documents.py", "LookupError, AttributeError, RecursionError, pa.ArrowException) as error:",
        "LookupError, AttributeError, pa.ArrowException) as error:",
        ("tests/cluster/dataset/test_damaged.py",),
    ),
    Mutant(
        "a caption that is null is named",
        "cluster/dataset/rows.py", "for name in _TEXTS & set(columns):\n            if (kind", "for name in ():\n            if (kind",
        ("tests/cluster/dataset/test_rows.py::test_a_caption_that_is_missing_or_no_text_is_named",),
    ),
    Mutant(
        "shards of somebody else are not counted as ours",
        "cluster/store/outputs.py", "if not key.startswith(own)), None)", "if False), None)",
        ("tests/cluster/store/test_outputs.py::test_a_dataset_is_not_begun_among_other_things",),
    ),
    Mutant(
        "a URI with a double colon does not go elsewhere",
        "cluster/store/store.py", "    _refuse_unmeant_chain(uri)\n", "",
        ("tests/cluster/store/test_outputs.py::test_a_uri_that_fsspec_would_cut_at_a_double_colon_is_refused",),
    ),
    Mutant(
        "a place that cannot hold the result is refused before the job begins",
        "jobs/command_line.py", "            _check_outputs(request)\n", "",
        ("tests/cluster/store/test_outputs.py::test_every_job_refuses_such_a_place_before_it_begins",),
    ),
    Mutant(
        "a shard of another size is not read",
        "cluster/dataset/rows.py", "if size != shard.bytes:", "if False:",
        ("tests/cluster/dataset/test_rows.py::test_another_shard_than_the_manifests_is_noticed_when_it_is_opened",),
    ),
    Mutant(
        "a shard of other rows is not read",
        "cluster/dataset/rows.py", "if file.metadata.num_rows != shard.rows:", "if False:",
        (
            "tests/cluster/dataset/test_rows.py::"
            "test_rows_that_the_manifest_does_not_know_are_noticed_without_the_checksum",
        ),
    ),
    Mutant(
        "a shard of other bytes is not read",
        "cluster/dataset/rows.py", "if found != shard.sha256:", "if False:",
        ("tests/cluster/dataset/test_rows.py::test_another_shard_than_the_manifests_is_noticed_when_it_is_opened",),
    ),
    Mutant(
        "a tie in a sweep is won by the preset's value",
        "cluster/sweep/results.py", "return -mean, changed, json", "return -mean, 0, json",
        (
            "tests/cluster/sweep/test_sweep_report.py::"
            "test_a_tie_is_won_by_the_presets_value_in_whatever_order_trials_come",
        ),
    ),
    Mutant(
        "the throughput chart counts a second once",
        "cluster/report/throughput.py", "1 / np.maximum(in_hand[:-1], 1)", "1.0",
        ("tests/cluster/report/test_throughput.py",),
    ),
    Mutant(
        "a shard is committed by its last put",
        "cluster/generation/stages/write.py",
        "            store_quarantine(self._store, row.shard, quarantined)\n"
        "            self._store.write_bytes(shard_key(row.shard), shard_data)\n",
        "            self._store.write_bytes(shard_key(row.shard), shard_data)\n"
        "            store_quarantine(self._store, row.shard, quarantined)\n",
        ("tests/cluster/generation/stages/test_write.py::test_one_that_still_stores_its_shard_is_waited_for",),
    ),
    Mutant(
        "the first writer to commit a shard wins",
        "cluster/generation/stages/write.py",
        "            if self._is_committed(shard):\n                return False\n",
        "",
        ("tests/cluster/generation/stages/test_write.py::test_the_first_of_two_writers_wins",),
    ),
    Mutant(
        "a writer that stores its shard still is waited for",
        "cluster/generation/stages/write.py",
        '.get("end_time", 0) > self._began',
        '.get("end_time", 0) > 2 * self._began',
        ("tests/cluster/generation/stages/test_write.py::test_one_that_still_stores_its_shard_is_waited_for",),
    ),
    Mutant(
        "a put of what must be new leaves what is there",
        "cluster/store/store.py",
        "            if says_existing(error):\n                return False\n",
        "            if says_existing(error):\n                pass\n",
        ("tests/cluster/store/test_store.py::test_of_several_that_create_an_object_one_succeeds",),
    ),
    Mutant(
        "a picture does not depend on its neighbours: its slot in the batch",
        "pcm/generation/isolation.py", "{waiting[index].position % self.batch_size: waiting[index] for index in indices}",
        "dict(enumerate(waiting[index] for index in indices))",
        ("tests/pcm/generation/test_isolation.py::test_a_request_always_has_the_same_slot_whoever_is_beside_it",),
    ),
    Mutant(
        "a picture does not depend on its neighbours: its own random numbers",
        "pcm/generation/pipeline_call.py", 'generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],',
        'generator=torch.Generator("cpu").manual_seed(seeds[0]),',
        ("tests/pcm/generation/test_diffusers_pipeline.py::test_a_picture_does_not_depend_on_what_is_drawn_beside_it",),
    ),
    Mutant(
        "a dataset of which nothing is held out is refused before it is trained on",
        "cluster/training/feed.py", "if count < LEAST_PICTURES:\n        raise InputError", "if False:\n        raise InputError",
        ("tests/cluster/training/test_feed.py",),
    ),
    Mutant(
        "a model that does not fit into memory is refused before it is read",
        "pcm/generation/model_memory.py", "    if needed <= available:", "    if True:",
        ("tests/pcm/generation/test_model_memory.py::"
         "test_a_model_that_is_larger_than_the_machine_is_refused_before_it_is_read",),
    ),
    Mutant(
        "a model too large for every GPU of the cluster is refused before a process starts",
        "cluster/generation/fit.py", "needed <= largest * 1e9", "True",
        ("tests/pcm/generation/test_model_memory.py::"
         "test_a_cluster_whose_gpus_are_too_small_is_refused_before_a_process_starts",),
    ),
    Mutant(
        "a scheduler that looks back keeps the outputs of CUDA graphs",
        "pcm/generation/pipeline_loading.py",
        "return tree_map_only(torch.Tensor, torch.clone, compiled(*args, **kwargs))",
        "return compiled(*args, **kwargs)",
        ("tests/pcm/generation/test_pipeline_loading.py::"
         "test_a_scheduler_that_looks_back_sees_earlier_outputs_though_all_are_written_to_one_place",),
    ),
    Mutant(
        "a pipeline whose pictures depend on their neighbours draws one at a time",
        "pcm/generation/diffusers_pipeline.py", "if found.independent:", "if True:",
        (
            "tests/pcm/generation/test_neighbours.py::"
            "test_a_pipeline_that_pads_to_the_longest_prompt_draws_one_at_a_time_and_says_so",
        ),
    ),
    Mutant(
        "a size that a pipeline does not draw is refused",
        "pcm/generation/diffusers_pipeline.py", "if asked not in (None, drawn):", "if False:",
        (
            "tests/pcm/generation/test_neighbours.py::"
            "test_a_size_that_the_pipeline_does_not_draw_is_refused_with_the_one_it_does",
        ),
    ),
    Mutant(
        "an error on the way leaves no part in another precision",
        "pcm/generation/diffusers_pipeline.py", "if part.dtype != dtype:", "if False:",
        (
            "tests/pcm/generation/test_neighbours.py::"
            "test_a_part_that_an_error_left_in_another_precision_is_put_back",
        ),
    ),
    Mutant(
        "a negative prompt without effect is refused",
        "pcm/generation/pipeline_signature.py", "elif guidance_scale is not None and guidance_scale <= least:",
        "elif False:",
        ("tests/pcm/generation/test_pipeline_signature.py::test_a_negative_prompt_without_effect_is_refused",),
    ),
    Mutant(
        "drawing options are refused with the null generator",
        "cluster/generation/picture_spec.py", "if name in DRAWING_FIELDS]:", "if False]:",
        ("tests/cluster/generation/test_picture_spec.py::test_the_null_generator_refuses_what_only_a_model_listens_to",),
    ),
    Mutant(
        "a folder's path enters no seed",
        "pcm/generation/seeds.py", "if version > 1:", "if False:",
        ("tests/pcm/generation/test_seeds.py::test_where_a_folder_lies_enters_no_seed_since_version_two",),
    ),
    Mutant(
        "a folder's revision leaves out what a download left there",
        "pcm/generation/pipeline_files.py", "return any(part.startswith", "return False and any(part.startswith",
        ("tests/pcm/generation/test_pipeline_signature.py::test_a_folders_revision_is_of_what_its_index_names",),
    ),
    Mutant(
        "--retry-quarantined tries these samples and no others",
        "cluster/generation/stages/merge.py", 'pc.is_in(quarantined["reason"], pa.array(list(reasons), pa.string()))',
        'pc.is_valid(quarantined["reason"])',
        ("tests/cluster/generation/test_retry_quarantined.py",),
    ),
    Mutant(
        "--retry-quarantined, killed between its puts, is ended by the same command",
        "cluster/generation/stages/merge.py", "return shard_table, quarantined.filter(pc.invert(in_shard))",
        "return shard_table, quarantined",
        ("tests/cluster/generation/test_retry_quarantined.py::test_killed_between_its_puts_it_is_seen_and_ended_by_the_same_command",),
    ),
    Mutant(
        "--retry-quarantined, killed between its puts, has lost nothing",
        "cluster/generation/stages/merge.py", "    store.write_bytes(shard_key(shard), shard_data)\n    store_quarantine(",
        "    store_quarantine(",
        ("tests/cluster/generation/test_retry_quarantined.py::test_killed_between_its_puts_it_is_seen_and_ended_by_the_same_command",),
    ),
    Mutant(
        "--retry-quarantined, killed, tries nothing twice",
        "cluster/generation/retrying.py", ".get(RETRIED_BY) == retry.id", ".get(RETRIED_BY) is retry",
        ("tests/cluster/generation/test_retry_quarantined.py::test_a_retry_that_was_killed_is_ended_and_tries_nothing_twice",),
    ),
    Mutant(
        "of processes that start together one compares a model's files",
        "cluster/weights/compared.py", "fcntl.flock(lock, fcntl.LOCK_EX)", "pass",
        ("tests/cluster/weights/test_compared.py::test_of_processes_that_start_together_one_reads",),
    ),
    Mutant(
        "what a later release has derived is not written anew",
        "cluster/dataset/derived.py", "    except OtherSchema:  # it says much, to another release\n        raise\n", "",
        ("tests/cluster/dataset/test_view.py::test_a_view_of_a_later_release_is_not_written_anew",),
    ),
    Mutant(
        "a sweep whose data has changed ends",
        "cluster/sweep/sweep.py", "return self._recorder.data_error is not None", "return False",
        ("tests/cluster/sweep/test_sweep.py::test_a_sweep_whose_data_changes_ends_before_its_next_trial",),
    ),
    Mutant(
        "a run ends a retry that was killed",
        "cluster/generation/pipeline.py", "                again.update(retried)\n", "",
        ("tests/cluster/generation/test_retry_quarantined.py::test_a_run_ends_a_retry_that_was_killed",),
    ),
    Mutant(
        "a node that does not see a local folder works on nothing there",
        "cluster/shard_work.py", "    check_here(landmarks)\n", "",
        (
            "tests/cluster/test_shard_work.py::test_a_node_that_does_not_see_the_folder_works_on_nothing",
            "tests/cluster/dataset/test_plan.py::test_tasks_write_parts_only_where_they_see_the_folder",
        ),
    ),
    Mutant(
        "a job with libraries of another release ends before it writes",
        "jobs/command_line.py", "                check_releases()\n", "",
        ("tests/cluster/test_releases.py::test_a_job_with_another_release_ends_in_one_line_and_writes_nothing",),
    ),
    Mutant(
        "a generator with libraries of another release draws nothing",
        "cluster/generation/stages/draw.py", "        check_releases()\n", "",
        ("tests/cluster/test_releases.py::test_a_worker_with_another_release_does_nothing",),
    ),
    Mutant(
        "weights of another dtype than the spec's draw nothing",
        "pcm/generation/pipeline_loading.py", "        _check_dtype(pipeline, spec)\n", "",
        ("tests/pcm/generation/test_pipeline_loading.py::"
         "test_a_release_of_diffusers_that_passes_over_the_dtype_is_told_of",),
    ),
    Mutant(
        "shards of a finished dataset are not made again by another pyarrow unasked",
        "cluster/generation/pipeline.py", "pyarrow = needed_pyarrow(store, plan, missing, on_store)\n", "pass\n",
        ("tests/cluster/generation/test_repair.py::test_the_job_repairs_with_the_real_pipeline",),
    ),
    Mutant(
        "a dataset that goes on with other releases says so",
        "cluster/generation/pipeline.py", "                warn_of_other_releases(store)\n", "                pass\n",
        ("tests/cluster/generation/test_repair.py::test_the_job_repairs_with_the_real_pipeline",),
    ),
    Mutant(
        "a machine that draws with other releases than the driver's is told of",
        "cluster/generation/pipeline.py", "                warn_of_mixed_releases(store, stats, environments)\n", "",
        ("tests/cluster/generation/test_repair.py::test_the_job_repairs_with_the_real_pipeline",),
    ),
    Mutant(
        "a machine with another pyarrow makes no shard of a finished dataset again",
        "cluster/generation/stages/generator.py", "            self._write.check_pyarrow()\n", "            pass\n",
        ("tests/cluster/generation/test_repair.py::test_the_job_repairs_with_the_real_pipeline",),
    ),
    Mutant(
        "a run begun under another Ray goes on",
        "cluster/training/checkpoints.py", "    if not reads_checkpoint_record(record):\n        renewed =", "    if False:\n        renewed =",
        ("tests/cluster/training/test_checkpoints.py::"
         "test_a_record_of_another_ray_is_written_anew_in_this_ones_form",),
    ),
    Mutant(
        "a cluster of another Ray is named in one line",
        "cluster/session.py", "    except (ConnectionError, RuntimeError) as error:\n        address", "    except ZeroDivisionError as error:\n        address",
        ("tests/cluster/test_session.py::test_a_cluster_of_another_ray_or_python_is_named_in_one_line",),
    ),
    Mutant(
        "--repair makes exactly what is damaged again",
        "cluster/generation/repair.py", "    draw(found)\n", "",
        ("tests/cluster/generation/test_repair.py::test_exactly_what_is_damaged_is_made_again",),
    ),
    Mutant(
        "the gate stops a run whose mean score is too low",
        "cluster/dataset/clip_scores.py", "if scores.mean + 2 * scores.standard_error >= threshold:", "if True:",
        ("tests/cluster/generation/test_progress.py::test_the_gate_closes_only_beyond_doubt_and_shows_an_example",),
    ),
    Mutant(
        "training: a loss that is no number stops the run, with the batch's ids",
        "cluster/training/loop.py", "if not math.isfinite(value):", "if False:",
        ("tests/cluster/training/test_train.py::test_a_loss_that_is_no_number_stops_the_run",),
    ),
    Mutant(
        "training: an epoch is gone on with where it was left",
        "cluster/training/loop.py", 'progress.step - (progress.history[-1]["step"] if progress.history else 0)', "0",
        ("tests/cluster/training/test_train.py::test_a_run_whose_driver_and_worker_were_killed_inside_epochs_equals_an_undisturbed_one",),
    ),
    Mutant(
        "training: rows that fill up the last batch have no targets",
        "cluster/training/data/batches.py", "np.full((rows, shape.max_length), -1, np.int64)",
        "np.zeros((rows, shape.max_length), np.int64)",
        ("tests/cluster/training/data/test_shuffled.py::test_padding_rows_of_the_last_batch_have_no_targets",),
    ),
    Mutant(
        "training: dropout belongs to the row of the global batch",
        "cluster/training/step.py", "row_seed(self._config.seed, step, row) for row in rows",
        "row_seed(self._config.seed, step, row - rows.start) for row in rows",
        ("tests/cluster/training/test_step.py::test_four_workers_have_the_losses_of_one_with_dropout_and_with_two_parts_each",),
    ),
    Mutant(
        "training: what is wrong with the input is not tried again",
        "cluster/training/ray_trainer.py", "return FailureDecision.RAISE", "pass",
        ("tests/cluster/training/test_train.py::test_an_error_of_the_users_is_not_tried_again",),
    ),
    Mutant(
        "training: a checkpoint is whole when every rank has reported, though the first alone has files",
        "cluster/training/ray_trainer.py", "if status.training_report is not None)",
        "if status.training_report is not None and status.training_report.checkpoint)",
        (
            "tests/cluster/training/test_train.py::"
            "test_a_group_grows_right_after_a_checkpoint_to_the_largest_size_there_is_room_for",
        ),
    ),
    Mutant(
        "training: a group does not stop to wait for what another job has",
        "cluster/training/ray_trainer.py", "now + free_room(**self._worker)", "now + 64",
        ("tests/cluster/training/test_train.py::test_a_group_does_not_stop_to_wait_for_what_another_job_has",),
    ),
    Mutant(
        "training: a cache without room is done without",
        "cluster/training/data/shard_cache.py", "except OSError as error:", "except KeyError as error:",
        ("tests/cluster/training/data/test_shuffled.py::test_a_cached_shard_is_not_read_again_and_a_cache_without_room_is_done_without",),
    ),
    Mutant(
        "training: features that are not finite do not become so in 8 bits",
        "pcm/kernels/quantised.py", "per_unit[scale == 0] = 0.0", "scale[:] = scale.nan_to_num(0, 0)",
        ("tests/pcm/kernels/test_quantised.py::test_zeros_stay_zeros_and_what_is_not_finite_does_not_become_so",),
    ),
    Mutant(
        "stream: the manifest of an earlier plan is not taken for this one's",
        "cluster/training/data/arriving.py", "return manifest.corpus_fingerprint == plan.corpus_fingerprint", "return True",
        ("tests/cluster/training/test_stream.py::test_the_manifest_is_waited_for_and_an_older_one_is_not_taken",),
    ),
    Mutant(
        "a tracker that fails is given up, and training goes on",
        "cluster/training/trackers.py", "except BaseException as error:", "except KeyError as error:",
        ("tests/cluster/training/test_trackers.py::test_a_tracker_that_fails_is_one_warning_without_its_message",),
    ),
    Mutant(
        "a sweep's finished trial is not trained again",
        "cluster/sweep/trial.py", "if (result := read_result(store)) is not None:", "if (result := None) is not None:",
        ("tests/cluster/sweep/test_sweep.py::test_a_finished_sweep_trains_nothing_again",),
    ),
    Mutant(
        "a pickle cannot set the state of what it builds",
        "pcm/safe_pickle/reader.py", 'raise pickle.UnpicklingError("it sets the state of something else than an array")',
        "pass",
        ("tests/pcm/safe_pickle/test_safe_pickle.py::test_the_state_of_values_cannot_be_set",),
    ),
    Mutant(
        "a captioner is loaded without its CLIP",
        "pcm/captioners/captioner.py",
        "clip=clip if isinstance(clip, ClipEncoder) else load_clip,",
        "clip=clip if isinstance(clip, ClipEncoder) else load_clip(),",
        ("tests/cluster/evaluation/test_from_features.py::"
         "test_a_captioner_is_loaded_without_its_clip_and_asks_for_it_with_the_first_picture",),
    ),
    Mutant(
        "features of another shape are left out and named",
        "cluster/dataset/given_features.py",
        "if image.shape == (shape.embed_dim,) and patches.shape == (shape.num_patches, shape.patch_dim):",
        "if True:",
        ("tests/cluster/evaluation/test_from_features.py::"
         "test_damaged_features_and_those_of_another_clip_are_left_out_and_named",),
    ),
    Mutant(
        "features that are recorded to be of another CLIP are refused",
        "cluster/evaluation/captioners.py", "if wanted and given and wanted != given:", "if False:",
        ("tests/cluster/evaluation/test_from_features.py::"
         "test_features_of_another_clip_than_the_captioners_are_refused",),
    ),
    Mutant(
        "features of another CLIP are not mixed, whatever name is given to it",
        "cluster/dataset/together.py", "if not all(torch.equal(head[name], other_head[name]) for name in head):", "if False:",
        ("tests/jobs/test_import_official.py::test_imported_features_are_mixed_with_those_of_the_same_clip_alone",),
    ),
    Mutant(
        "an ensemble is of one vocabulary",
        "pcm/captioners/captioner.py",
        "if different := [name for name, is_so in differences.items() if is_so]:", "if different := []:",
        ("tests/cluster/evaluation/test_from_features.py::"
         "test_an_ensemble_of_one_captioner_twice_says_what_it_says_alone",),
    ),
    Mutant(
        "given concepts stay when words are counted again",
        "cluster/dataset/vocabularies.py",
        "if not (store.exists(GIVEN_CONCEPTS_KEY) or CONCEPTS_KEY in intact):", "if True:",
        ("tests/cluster/dataset/test_given_concepts.py::test_a_dataset_keeps_the_concepts_that_it_was_given",),
    ),
    Mutant(
        "a dataset goes on with the commit of its CLIP",
        "cluster/generation/pinning.py", "if begun is not None and begun.model == model and", "if False and",
        ("tests/pcm/clip/test_hub_revision.py::test_a_dataset_goes_on_with_the_commit_of_its_clip",),
    ),
    Mutant(
        "of vocabulary, concepts and head the intact ones stay",
        "cluster/dataset/vocabularies.py", "if CLIP_HEAD_KEY not in intact:", "if True:",
        ("tests/cluster/dataset/test_damaged.py::test_of_words_concepts_and_head_those_that_are_intact_stay",),
    ),
    Mutant(
        "a repair that is interrupted forgets no damage",
        "cluster/generation/repair.py", "store.delete(key)  # missing", 'store.delete("vocabularies.json")  # missing',
        ("tests/cluster/generation/test_repair.py::test_a_repair_that_is_interrupted_forgets_no_damage",),
    ),
    Mutant(
        "a run is not resumed with other concepts",
        "cluster/training/run_document.py", "if concepts[0] != concepts[1]:", "if False:",
        ("tests/cluster/dataset/test_given_concepts.py::"
         "test_training_takes_concepts_of_a_file_and_says_so_in_its_config",),
    ),
    Mutant(
        "a published picture is found by its id, not by its annotation's folder",
        "cluster/sources/published_folders.py",
        "return [*([first] if first >= 0 else []), *(split for split in known if split != first)]",
        "return [first]",
        ("tests/jobs/test_import_official.py::"
         "test_refined_annotations_find_their_pictures_by_id_and_their_scores_are_5_times_the_cosine",),
    ),
    Mutant(
        "a folder without CoreNLP is refused at the start",
        "pcm/text/spice.py", "    if not named:\n        return None", "    return None",
        ("tests/pcm/text/test_spice.py::test_a_folder_without_the_models_is_refused_by_name",),
    ),
)  # fmt: skip


def run(tree: Path, tests: tuple[str, ...], *, seconds: float) -> str | None:
    """What pytest says of failing tests in a copy of the tree, also that they hang; None when all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", *tests]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        subprocess.run(["pkill", "-9", "-s", str(process.pid)], check=False)
        process.communicate()
        return f"longer than {seconds:g} s"
    if process.returncode not in (0, 1):
        sys.exit(f"pytest {' '.join(tests)}: exit status {process.returncode}\n{output.decode()[-2000:]}")
    return output.decode()[-2000:] if process.returncode else None


def main() -> None:
    wanted = [mutant for mutant in MUTANTS if not sys.argv[1:] or any(word in mutant.handling for word in sys.argv[1:])]
    if not wanted:
        names = "; ".join(mutant.handling for mutant in MUTANTS)
        sys.exit(f"no mutant is named like {' '.join(sys.argv[1:])}; they are: {names}")
    alive = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", *LEFT_BEHIND))
        healthy = tuple(sorted({test for mutant in wanted for test in mutant.tests}))
        failure = run(tree, healthy, seconds=10 * SECONDS)
        if failure:
            sys.exit(f"the tests fail without any mutant:\n{failure}")
        for mutant in wanted:
            path = tree / mutant.file
            source = path.read_text()
            if source.count(mutant.source) != 1:
                sys.exit(
                    f"{mutant.file}: {mutant.source!r} is there {source.count(mutant.source)} times, expected once"
                )
            path.write_text(source.replace(mutant.source, mutant.without))
            dead = run(tree, mutant.tests, seconds=SECONDS) is not None
            path.write_text(source)
            print(f"{'dead ' if dead else 'ALIVE'} {mutant.handling}", file=sys.stderr, flush=True)
            if not dead:
                alive.append(mutant.handling)
    print(json.dumps({"mutants": len(wanted), "alive": alive, "seconds": round(time.monotonic() - started, 1)}))
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main()
