"""Other tools' spellings: understood, and reported."""

from __future__ import annotations

# axolotl, LLaMA-Factory, TRL, Oumi, ms-swift and W&B words -> ours. The left side may stand at the top or in any block.
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
"""W&B's distributions with exponents of e as their ends -> the same with values as their ends."""

OPTIMIZERS = {
    "adamw_torch_fused": "adamw_torch",
    "adamw": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""HF's names of the same optimisers -> ours."""

VALUE_ALIASES = {
    **{("train.optim", theirs): ours for theirs, ours in OPTIMIZERS.items() if theirs != ours},
    ("method", "full_finetuning"): "full",
    ("search.method", "bayes"): "tpe",
    ("search.method", "bayesian"): "tpe",
    ("search.method", "optuna"): "tpe",
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
