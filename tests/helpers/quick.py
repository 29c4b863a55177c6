"""The selection of `make test-quick` (`pytest --quick`): the first case of every test on every backend."""

from .paths import TESTS

#: Tests whose first case takes long already. They are left to `make test`. Every file keeps at least one test.
SLOW = {
    "bench/test_distillation.py": {"test_medians_and_peaks_are_measured"},
    "bench/test_distributed.py": {"test_the_losses_send_a_few_numbers_a_kept_token"},
    "bench/test_emulator.py": {"test_every_kernel_option_and_dtype_is_as_right_as_pytorch"},
    "bench/test_gpu.py": {"test_a_part_ends_with_all_that_it_started_when_its_time_is_over"},
    "bench/test_proofs_compiled.py": {
        "test_a_peer_is_launched_by_its_own_launcher",
        "test_every_kernel_that_a_launcher_asks_for_is_compiled",
        "test_kernels_get_what_was_passed_to_their_launch",
        "test_kernels_of_a_measured_table_are_compiled_for_its_architecture",
        "test_quick_run_is_green",
    },
    "bench/test_run.py": {
        "test_out_of_time_everything_is_listed",
        "test_rows_say_what_they_are",
        "test_the_figures_are_those_that_pytest_benchmark_measured",
        "test_what_fails_at_one_size_is_said_and_measured_at_others",
        "test_what_has_too_little_memory_is_left_out_and_no_failure",
        "test_what_is_missing_is_skipped_with_its_reason",
        "test_what_is_wrong_gets_no_speed",
    },
    "deferred/test_operations.py": {"test_compiled_functions_take_deferred_logits"},
    "distributed/test_calls.py": {"test_compiled"},
    "distributed/test_dtensor.py": {"test_compiled_heads", "test_compiled_logits"},
    "hf/test_compile.py": {
        "test_other_ways_to_compile",
        "test_patched_and_then_compiled_with_options",
        "test_statistics_and_the_report",
        "test_trainer",
    },
    "hf/test_refused.py": {"test_a_compiled_sum_is_checked_too"},
    "hf/test_transformers_coverage.py": {"test_a_process_that_dies_or_hangs_is_a_row"},
    "hf/test_without_labels.py": {"test_compiled"},
    "linear/test_compile.py": {"test_inductor"},
    "logits/test_compile.py": {"test_inductor_with_dynamic_shapes"},
    "losses/test_linear_cross_entropy.py": {"test_gradcheck"},
    "losses/test_memory.py": {
        "test_a_patched_models_training_step_holds_no_logits",
        "test_no_logits_beside_the_gradients",
        "test_scratch_does_not_grow_with_the_tokens",
        "test_the_measure_sees_what_pytorch_holds",
    },
    "project/test_distributions.py": {"test_its_commands_work_in_an_empty_folder"},
    "project/test_docs.py": {
        "test_a_program_prints_what_its_page_shows",
        "test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere",
    },
    "project/test_examples.py": {"test_a_model_by_its_name"},
    "tools/test_cost.py": {"test_formulas_hold_in_a_process"},
    "trl/test_patch_trainer.py": {"test_compiled", "test_importing_does_not_import_trl"},
}


def select(items):
    """(selected, left out)."""
    selected, left_out, seen = [], [], set()
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        case = item.path, item.cls, item.originalname, backend
        slow = item.originalname in SLOW.get(item.path.relative_to(TESTS).as_posix(), ())
        (left_out if slow or case in seen else selected).append(item)
        seen.add(case)
    return selected, left_out
