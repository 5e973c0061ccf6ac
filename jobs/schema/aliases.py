"""Map the field names and values of other tools to those of lorafleet.

This module is data. jobs/loading/job_file.py applies the names and reports each
translation to the user; the importers use the values. Arguments without a counterpart
are listed as well, so that the error for them can say so.
"""

from __future__ import annotations

# Field names of axolotl, LLaMA-Factory, TRL, Oumi, ms-swift and W&B -> the lorafleet field.
# The names on the left are accepted at the top level of a job file and in any block.
FIELD_ALIASES = {
    "base_model": "model.model_name_or_path",
    "model_name": "model.model_name_or_path",
    "model_id": "model.model_name_or_path",
    "cutoff_len": "model.max_length",
    "sequence_len": "model.max_length",
    "max_seq_length": "model.max_length",
    "model_max_length": "model.max_length",
    "torch_dtype": "model.dtype",
    "lora_rank": "lora.lora_r",
    "rank": "lora.lora_r",
    "r": "lora.lora_r",
    "alpha": "lora.lora_alpha",
    "target_modules": "lora.lora_target_modules",
    "lora_target": "lora.lora_target_modules",
    "lr": "train.learning_rate",
    "optimizer": "train.optim",
    "num_epochs": "train.num_train_epochs",
    "epochs": "train.num_train_epochs",
    "micro_batch_size": "train.per_device_train_batch_size",
    "batch_size": "train.per_device_train_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "total_batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "lr_scheduler": "train.lr_scheduler_type",
    "gradient_clipping": "train.max_grad_norm",
    "gradient_clip_val": "train.max_grad_norm",
    "dataset": "data.dataset_name",
    "train_data": "data.train_file",
    "eval_file": "data.validation_file",
    "val_file": "data.validation_file",
    "max_samples": "data.max_train_samples",
    "field_messages": "data.messages_column",
    "default_system": "data.system_prompt",
    "default_system_message": "data.system_prompt",
    "wandb_project": "tracking.project",
    "wandb_entity": "tracking.entity",
    "num_workers": "resources.workers_per_node",
    "ray_num_workers": "resources.workers_per_node",
    "num_trials": "search.num_samples",
    "run_cap": "search.num_samples",
    "max_trials": "search.num_samples",
    "max_concurrent": "search.max_concurrent_trials",
    "early_terminate": "search.scheduler",
    "eta": "search.scheduler.reduction_factor",
}

# A test compares this list with the arguments of the installed transformers and TRL.
_NO_COUNTERPART = """
    lr_scheduler_kwargs optim_args adam_beta1 adam_beta2 adam_epsilon optim_target_modules
    average_tokens_across_devices label_smoothing_factor tf32 torch_compile_backend
    torch_compile_mode
    liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps logging_strategy
    logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_delay prediction_loss_only eval_on_start
    eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
    batch_eval_metrics save_only_model save_on_each_node save_total_limit enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism accelerator_config
    parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    dataloader_in_order remove_unused_columns label_names length_column_name
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout debug skip_memory_metrics do_train do_eval do_predict local_rank model_init_kwargs
    router_aux_loss_coef dataset_kwargs dataset_num_proc eos_token truncation_mode shuffle_dataset
    packing_strategy pad_to_multiple_of eval_packing loss_type activation_offloading pad_token
    lora_target_parameters lora_modules_to_save lora_task_type half_precision_backend logging_dir
    overwrite_output_dir fp16_opt_level
"""
_COUNTERPARTS = {
    "output_dir": "the option --runs",
    **dict.fromkeys(("bf16", "bf16_full_eval"), "train.mixed_precision: bf16"),
    **dict.fromkeys(("fp16", "fp16_full_eval"), "train.mixed_precision: fp16"),
    **dict.fromkeys(
        (
            "activation_checkpointing",
            "activation_checkpointing_kwargs",
            "gradient_checkpointing_kwargs",
        ),
        "train.gradient_checkpointing",
    ),
    "use_liger_kernel": "train.chunked_loss, which is on by default",
    "auto_find_batch_size": "retries.oom, which halves the micro-batch size",
    "report_to": "tracking.mode",
    "run_name": "name",
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), "train.eval_steps"),
    **dict.fromkeys(("save_strategy", "save_steps"), "train.checkpoint_minutes"),
    "load_best_model_at_end": "none (the weights of the best evaluation are always kept)",
    "metric_for_best_model": "search.metric.name",
    "greater_is_better": "search.metric.goal",
    "data_seed": "train.seed (order of the rows) and data.split_seed (rows of each split)",
    **dict.fromkeys(("use_cpu", "no_cuda"), "resources.device: cpu"),
    "deepspeed": "resources.strategy and resources.deepspeed_config",
    **dict.fromkeys(("fsdp", "fsdp_config"), "resources.strategy: fsdp"),
    "resume_from_checkpoint": "the command `lorafleet resume RUN`",
    "train_sampling_strategy": "train.group_by_length",
    "dataset_text_field": "data.text_column",
    "completion_only_loss": "data.assistant_only_loss",
    "chat_template_path": "data.chat_template",
    "model_revision": "model.revision",
    "use_peft": "method",
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "method: qlora, with qlora.quant_type"),
    "bnb_4bit_quant_type": "qlora.quant_type",
    "bnb_4bit_quant_storage": "qlora.quant_storage",
    "bnb_4bit_compute_dtype": "qlora.compute_dtype",
    "use_bnb_nested_quant": "qlora.use_double_quant",
}
HF_ARGUMENTS: dict[str, str | None] = dict.fromkeys(_NO_COUNTERPART.split()) | _COUNTERPARTS
"""Arguments of Hugging Face's Trainer and of TRL that are not lorafleet fields -> the closest
counterpart; None if there is none.
"""


def get_foreign_hint(key: str) -> str | None:
    """Return what to use instead of a Hugging Face argument, or None for any other key.

    Args:
        key: A key as the user wrote it. Only its last part counts, so `train.bf16` is
            recognised too.

    Returns:
        The end of a sentence, without a full stop.
    """
    leaf = key.rpartition(".")[2]
    if leaf not in HF_ARGUMENTS:
        return None
    counterpart = HF_ARGUMENTS[leaf]
    return (
        f"its counterpart in lorafleet is {counterpart}"
        if counterpart
        else "it is an argument of Hugging Face's Trainer or TRL without a counterpart in lorafleet"
    )


DISTRIBUTION_ALIASES = {
    "loguniform": "log_uniform_values",
    "qloguniform": "q_log_uniform_values",
    "quniform": "q_uniform",
    "int": "int_uniform",
    "randint": "int_uniform",
    "float": "uniform",
    "choice": "categorical",
    "constant": "categorical",
}

EXPONENT_DISTRIBUTIONS = {
    "log_uniform": "log_uniform_values",
    "q_log_uniform": "q_log_uniform_values",
}
"""W&B's distributions whose bounds are exponents of e -> the same distributions with plain
values as bounds.
"""

OPTIMIZERS = {
    "adamw_torch_fused": "adamw_torch",
    "adamw": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""Hugging Face's names of optimizers -> lorafleet's name of the same optimizer."""

VALUE_ALIASES = {
    # OPTIMIZERS also has names that are the same in both, because the importers validate against
    # it.
    **{("train.optim", theirs): ours for theirs, ours in OPTIMIZERS.items() if theirs != ours},
    ("method", "full_finetuning"): "full",
    ("search.method", "bayes"): "tpe",
    ("search.method", "bayesian"): "tpe",
    ("search.method", "optuna"): "tpe",
    # The other keys of a Hyperband block are translated by jobs/trials/hyperband.py.
    ("search.scheduler.type", "hyperband"): "asha",
    ("search.scheduler.time_attr", "steps"): "step",
    ("search.scheduler.time_attr", "epochs"): "epoch",
    ("search.scheduler.time_attr", "training_iteration"): "step",
    ("search.metric.goal", "max"): "maximize",
    ("search.metric.goal", "min"): "minimize",
    ("lora.lora_target_modules", "all"): "all-linear",
    ("task", "sft"): "generation",
    ("task", "sequence_classification"): "classification",
    ("data.format", "alpaca"): "instruction",
    ("data.format", "chat"): "messages",
    ("data.format", "sharegpt"): "messages",
    ("data.format", "conversational"): "messages",
    ("data.format", "chatml"): "messages",
    ("data.format", "openai"): "messages",
    ("data.format", "chat_template"): "messages",
    ("data.format", "completion"): "text",
}
