"""The fault catalogue: what can happen to a run, A of the machine, B of the numbers, C of a model's files, D of data,
E of what is around; and the tests that make it happen. `test_promises.py` sees to it that all of them exist.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTES = "MIS_MLX_FAULTS"  # the file in which `benchmarks/faults.py` wants the tests' notes
FOLDERS = ("tests/faults/test_folders.py::test_a_bad_folder_is_one_sentence",)
SPEECH = ("tests/faults/test_folders.py::test_a_stranger_s_tokenizer_is_tried_in_a_child",)
ROWS = ("tests/data/test_rows.py::test_a_bad_line_is_skipped_and_named",)

CATALOGUE: dict[str, tuple[str, tuple[str, ...]]] = {
    "A1": ("SIGKILL at any time", (
        "tests/faults/test_kills.py::test_three_hundred_kills",
        "tests/faults/test_operations.py::test_the_end_of_the_process_at_every_operation",
        "tests/test_distill_kills.py::test_killed_and_resumed_is_the_undisturbed_run",
    )),
    "A2": ("SIGTERM or Ctrl-C", ("tests/test_distill_kills.py::test_sigterm_stops_after_the_step",)),
    "A3": ("a power cut", (
        "tests/faults/test_power.py::test_two_thousand_power_cuts",
        "tests/faults/test_power.py::test_without_a_sync_the_power_cut_is_found_out",
        "tests/test_distill_kills.py::test_a_damaged_checkpoint_costs_steps_not_the_run",
    )),
    "A4": ("the lid is closed", (
        "tests/hardware/test_clock.py::test_a_closed_lid_is_seen",
        "tests/hardware/thermal/test_run_monitor.py::test_a_step_during_which_the_machine_slept_is_done_again",
    )),
    "A5": ("a disk that fills up", (
        "tests/faults/test_disk.py::test_a_full_disk_is_waited_out",
        "tests/faults/test_disk.py::test_a_write_that_stops_halfway",
        "tests/faults/test_operations.py::test_every_operation_refused",
    )),
    "A6": ("a disk too small from the start", ("tests/faults/test_disk.py::test_too_small_at_the_start",)),
    "A7": ("a disk that stops answering, is read-only or pulled out", (
        "tests/faults/test_disk.py::test_a_disk_pulled_out",
        "tests/faults/test_disk.py::test_a_disk_that_is_read_only",
        "tests/faults/test_operations.py::test_every_operation_refused",
    )),
    "A8": ("two runs in one folder", (
        "tests/test_distill.py::test_a_run_in_use_is_refused",
        "tests/storage/test_checkpoint.py::test_a_second_process_is_told_who_holds_the_run",
    )),
    "A9": ("not enough memory", ("tests/test_distill.py::test_a_budget_too_small_is_a_sentence",)),
    "A10": ("a child that ends without an answer", (
        "tests/faults/test_strangers.py::test_only_an_answer_is_an_answer",
    )),
    "A11": ("clocks that jump", ("tests/storage/test_checkpoint.py::test_order_is_by_number_never_by_time",)),
    "A12": ("other settings on resume", ("tests/test_distill.py::test_a_resume_must_be_the_same_run",)),
    "A13": ("other versions on resume",
            ("tests/storage/test_run_folder.py::test_another_version_is_said_not_refused",)),
    "B1": ("a batch that gives no number", ("tests/faults/test_numbers.py::test_one_bad_batch_is_skipped",)),
    "B2": ("such batches in a row", (
        "tests/faults/test_numbers.py::test_three_in_a_row_go_back_and_on_without_them",
        "tests/faults/test_numbers.py::test_what_is_left_out_stays_left_out_after_a_kill",
        "tests/faults/test_numbers.py::test_again_three_in_a_row_stop_the_run",
    )),
    "B3": ("a row without an answer to learn", (
        "tests/test_examples.py::test_a_prompt_that_fills_the_window_is_a_sentence",
        "tests/distillation/test_train_loop.py::test_all_masked_is_not_a_division_by_zero",
    )),
    "B4": ("a spike of the gradient", (
        "tests/maths/test_optimizer.py::test_a_spike_is_clipped_to_mean_plus_five_sigma",
    )),
    "C1": ("a truncated file", FOLDERS),
    "C2": ("a header of 2^63 bytes", FOLDERS),
    "C3": ("a header that agrees with itself modulo 2^64", (
        *FOLDERS, "tests/faults/test_liars.py::test_twenty_thousand_liars",
    )),
    "C4": ("tensors that overlap, holes, junk", FOLDERS),
    "C5": ("a name twice", FOLDERS),
    "C6": ("weights that are not numbers", (
        "tests/faults/test_folders.py::test_weights_that_are_not_numbers_are_named",
    )),
    "C7": ("a flipped bit in a file with a known hash", (
        "tests/models/test_resolve.py::test_an_altered_wheel_is_deleted",
    )),
    "C8": ("paths and links that lead out", (
        *FOLDERS, "tests/faults/test_strangers.py::test_a_link_out_is_not_copied",
        "tests/storage/test_safetensors.py::test_links_into_a_hugging_face_cache_pass",
    )),
    "C9": ("stray and missing shards", FOLDERS),
    "C10": ("an absurd config", (*FOLDERS, "tests/models/test_config.py::test_a_bad_config_is_one_sentence")),
    "C11": ("the model's own program code", (
        *FOLDERS, *SPEECH, "tests/faults/test_folders.py::test_no_mark_is_left_by_foreign_code",
        "tests/faults/test_strangers.py::test_foreign_code_is_refused_explicitly_wherever_it_could_run",
    )),
    "C12": ("a chat template that wants out or never ends", (
        *SPEECH, "tests/faults/test_strangers.py::test_a_template_stays_in_its_sandbox",
    )),
    "C13": ("a tokenizer with a regex bomb", (
        "tests/faults/test_strangers.py::test_a_regex_bomb_is_a_sentence",
        "tests/faults/test_strangers.py::test_a_panic_on_other_words_is_a_sentence",
    )),
    "C14": ("what is no regular file", FOLDERS),
    "C15": ("a file that changes while it is read", (
        "tests/storage/test_safetensors.py::test_lazy_notices_that_a_file_changed_since_the_index",
    )),
    "C16": ("somebody else's GGUF", FOLDERS),
    "C17": ("a pickle", (*FOLDERS, "tests/faults/test_strangers.py::test_nothing_is_unpickled")),
    "D1": ("a broken line", ROWS),
    "D2": ("no usable row", ("tests/data/test_sources.py::test_a_file_without_a_usable_row_stops",)),
    "D3": ("a row of 50 MB", ("tests/data/test_rows.py::test_a_row_of_50_mb_is_dropped_without_being_held",)),
    "D4": ("another schema in row k", (*ROWS, "tests/test_examples.py::test_bad_rows_are_named")),
    "D5": ("special tokens spelled in a text", (
        "tests/data/test_token_windows.py::test_special_tokens_spelled_in_a_text_stay_text",
        "tests/data/test_token_windows.py::test_special_tokens_spelled_in_a_chat_stay_text",
    )),
    "D6": ("byte order marks, CRLF, NUL, bad UTF-8", (
        *ROWS, "tests/data/test_rows.py::test_harmless_oddities_are_accepted",
    )),
    "D7": ("data edited between two starts", ("tests/test_distill.py::test_a_resume_must_be_the_same_run",)),
    "D8": ("test rows in the training text", (
        "tests/data/test_sources.py::test_copies_and_test_rows_in_train_are_counted",
    )),
    "E1": ("a server that anybody can talk to: there is none", (
        "tests/faults/test_network.py::test_only_downloads_can_talk",
        "tests/faults/test_network.py::test_a_run_talks_to_nobody",
    )),
    "E2": ("an output folder that is somebody's", (
        "tests/storage/test_checkpoint.py::test_a_folder_that_exists_is_refused_and_untouched",
    )),
    "E3": ("secrets in what a run leaves", ("tests/faults/test_network.py::test_a_run_talks_to_nobody",)),
    "E4": ("an export that is not the model", (
        "tests/test_export.py::test_another_program_runs_the_file_as_mlx_runs_the_folder",
        "tests/test_export.py::test_four_bits_are_rewrapped_not_rounded",
    )),
}  # fmt: skip


def exists(test: str) -> bool:
    """Whether `path::name` is a test of this checkout."""
    path, _, name = test.partition("::")
    if not (ROOT / path).is_file():
        return False
    return any(
        isinstance(n, ast.FunctionDef) and n.name == name for n in ast.parse((ROOT / path).read_text("utf-8")).body
    )


def named(text: str) -> list[str]:
    """The tests that a text names: `tests/x/test_y.py::test_z`."""
    return re.findall(r"tests/[\w/]+\.py::\w+", text)
