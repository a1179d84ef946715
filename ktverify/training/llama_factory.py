"""Keys of LLaMA-Factory's configurations, and of transformers' arguments in them, that a training does not have here.

`sort_out` takes them out of a configuration: what makes no difference with a note, what would with a reason against it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ktverify.system.files import document
from ktverify.system.printable import shown_line

# key -> the key here that means the same
_SAME = {"cpu_infer": "kt_num_threads", "kt_threadpool_count": "kt_tp_count", "dtype": "torch_dtype"}
# why keys make no difference, whatever they are -> their names
_UNUSED_BY_REASON = {
    "there is no cache": "overwrite_cache data_shared_file_system cache_dir",
    "the examples are in memory": "dataloader_num_workers dataloader_prefetch_factor dataloader_persistent_workers "
    "dataloader_pin_memory preprocessing_batch_size buffer_size remove_unused_columns length_column_name",
    "a training is one process": "ddp_timeout ddp_find_unused_parameters ddp_backend ddp_bucket_cap_mb local_rank "
    "ddp_broadcast_buffers average_tokens_across_devices ray_num_workers ray_init_kwargs master_addr master_port "
    "ddp_static_graph save_on_each_node log_on_each_node log_level_replica",
    "nothing is evaluated": "eval_strategy evaluation_strategy eval_steps eval_on_start eval_delay batch_eval_metrics "
    "per_device_eval_batch_size eval_accumulation_steps eval_on_each_dataset eval_num_beams compute_accuracy "
    "metric_for_best_model greater_is_better prediction_loss_only bf16_full_eval fp16_full_eval "
    "eval_do_concat_batches eval_use_gather_object include_for_metrics",
    "losses are in loss.jsonl and loss.png": "plot_loss report_to run_name logging_dir logging_first_step log_level "
    "disable_tqdm use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_logdir "
    "include_num_input_tokens_seen include_tokens_per_second include_effective_tokens_per_second print_param_status "
    "logging_nan_inf_filter swanlab_api_key swanlab_lark_webhook_url swanlab_lark_secret project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id skip_memory_metrics",
    "dataset is a path": "dataset_dir",
    "the examples are texts": "media_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches "
    "video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate "
    "freeze_vision_tower freeze_multi_modal_projector freeze_language_model",
    "a training generates nothing": "do_sample temperature top_p top_k num_beams max_length max_new_tokens "
    "repetition_penalty length_penalty skip_special_tokens infer_backend infer_dtype use_kv_cache kt_maxlen kt_mode "
    "kt_use_cuda_graph kt_force_think kt_model_max_length use_cache vllm_config vllm_enforce_eager vllm_gpu_util "
    "vllm_max_lora_rank vllm_maxlen sglang_config sglang_lora_backend sglang_maxlen sglang_mem_fraction sglang_tp_size",
    "a training exports nothing, export-merged does": "export_dir export_size export_device export_legacy_format "
    "export_hub_model_id export_quantization_bit export_quantization_dataset export_quantization_maxlen "
    "export_quantization_nsamples",
    "python -m ktverify profile shows where the time goes": "profiler_active_steps profiler_output_dir profile_modules "
    "profiler_profile_memory profiler_record_shapes profiler_repeat profiler_wait_steps profiler_warmup_steps "
    "profiler_with_stack",
    "the routed experts are in the engine, everything else stays the model's": "kt_optimize_rule",
    "it only shares out memory, and the numbers are the same": "chunk_size kt_cpu_activation kt_share_backward_bb "
    "kt_max_cache_depth low_cpu_mem_usage use_reentrant_gc use_unsloth_gc torch_empty_cache_steps offload_folder "
    "gradient_checkpointing_kwargs",
    "gradient_checkpointing switches it on; the numbers are the same": "disable_gradient_checkpointing",
    "stage sft and finetuning_type lora do not use it": "pref_beta pref_ftx pref_loss dpo_label_smoothing "
    "kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs ref_model reward_model "
    "reward_model_type freeze_trainable_layers freeze_trainable_modules freeze_extra_modules pissa_iter "
    "loraplus_lr_embedding galore_rank galore_target apollo_rank apollo_target badam_mode asft_alpha eaft_alpha "
    "quantization_method quantization_type double_quantization pref_bco_weight ld_alpha ppo_score_norm ppo_target "
    "ppo_whiten_rewards ref_model_adapters ref_model_quantization_bit reward_model_adapters "
    "reward_model_quantization_bit oft_rank oft_block_size oft_target module_dropout galore_layerwise "
    "galore_proj_type galore_scale galore_update_interval apollo_layerwise apollo_proj apollo_proj_type apollo_scale "
    "apollo_scale_front apollo_scale_type apollo_update_interval badam_mask_mode badam_start_block "
    "badam_switch_interval badam_switch_mode badam_update_ratio badam_verbose fp8_backend "
    "fp8_enable_fsdp_float8_all_gather",
    "nothing is uploaded": "hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision",
    "HF_TOKEN in the environment is": "hf_hub_token ms_hub_token om_hub_token",
}
_UNUSED = {name: reason for reason, names in _UNUSED_BY_REASON.items() for name in names.split()}
_NO, _NONE = (False, None), (None, "", False)
# keys that have one effect here -> the values that mean it, and why no other
_ONE_EFFECT: dict[str, tuple[tuple[object, ...], str]] = {
    "val_size": ((0, None), "nothing is evaluated, and all examples are trained on"),
    "eval_dataset": (_NONE, "nothing is evaluated"),
    "do_eval": (_NO, "nothing is evaluated"),
    "do_predict": (_NO, "nothing is predicted"),
    "predict_with_generate": (_NO, "nothing is predicted"),
    "load_best_model_at_end": (_NO, "nothing is evaluated, so no checkpoint is the best"),
    "early_stopping_steps": (_NONE, "nothing is evaluated"),
    "bf16": ((True, False, None), "it is true or false"),
    "fp16": (_NO, "float16 needs a scaler of gradients, which does not exist here; bf16: true"),
    "pure_bf16": (_NO, "the factors of LoRA are float32"),
    "fp8": (_NO, "the weights are bfloat16, float16 or float32"),
    "quantization_bit": (_NONE, "the weights are bfloat16, float16 or float32"),
    "deepspeed": (_NONE, "a training is one process"),
    "fsdp": ((*_NONE, []), "a training is one process"),
    "fsdp_config": ((*_NONE, {}), "a training is one process"),
    **dict.fromkeys(
        ("accelerator_config", "parallelism_config", "hyper_parallel_args"), ((*_NONE, {}), "a training is one process")
    ),
    "use_hyper_parallel": (_NO, "a training is one process"),
    **dict.fromkeys(("tf32", "use_liger_kernel", "use_v1_kernels"), (_NO, "it is for GPUs")),
    "liger_kernel_config": ((*_NONE, {}), "it is for GPUs"),
    "use_cpu": (_NO, "CUDA_VISIBLE_DEVICES chooses the device"),
    **dict.fromkeys(
        ("device_map", "quantization_device_map"), ((*_NONE, "auto"), "the model is loaded by one process")
    ),
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), (_NONE, "the model is not compiled")),
    **dict.fromkeys(("optim_args", "optim_target_modules"), (_NONE, "the optimizer is AdamW on LoRA")),
    "full_determinism": (_NO, "seed alone decides"),
    "ignore_data_skip": (_NO, "a resumed training goes on where it stopped"),
    "restore_callback_states_from_checkpoint": (_NO, "a resumed training goes on where it stopped"),
    "enable_jit_checkpoint": (_NO, "checkpoints come every save_steps"),
    "enable_torch_profiler": (_NO, "python -m ktverify profile shows where the time goes"),
    "label_names": ((*_NONE, []), "labels are those of the answers"),
    "train_sampling_strategy": (("random", None), "every epoch is shuffled by seed"),
    "use_fast_tokenizer": ((True, None), "the tokenizer is transformers' usual one"),
    "preserve_thinking": (_NO, "the template is the tokenizer's own"),
    "init_special_tokens": ((*_NONE, "noise_init"), "the tokenizer stays as it is"),
    "new_special_tokens_config": ((*_NONE, {}), "the tokenizer stays as it is"),
    "upcast_lmhead_output": (_NO, "the model has one dtype, torch_dtype"),
    "use_mca": (_NO, "a training is one process"),
    "flash_attn": (("auto", "sdpa", None), "the attention is transformers' own, sdpa"),
    "enable_liger_kernel": (_NO, "it is for GPUs"),
    "use_unsloth": (_NO, "the model is transformers' own"),
    "torch_compile": (_NO, "the model is not compiled"),
    "save_only_model": (_NO, "a checkpoint keeps what a resumed training needs"),
    "save_strategy": (("steps",), "checkpoints come every save_steps"),
    "save_safetensors": ((True, None), "adapters are safetensors"),
    "logging_strategy": (("steps",), "losses come every logging_steps"),
    "push_to_hub": (_NO, "nothing is uploaded"),
    "adapter_name_or_path": (_NONE, "an adapter begins fresh; resume_from_checkpoint goes on from a checkpoint"),
    "create_new_adapter": (_NO, "there is one adapter"),
    "additional_target": (_NONE, "the adapter has LoRA alone"),
    "modules_to_save": (_NONE, "the adapter has LoRA alone"),
    "loraplus_lr_ratio": (_NONE, "all factors have one learning rate"),
    **dict.fromkeys(("use_dora", "pissa_init", "pissa_convert"), (_NO, "the adapter is plain LoRA or rslora")),
    **dict.fromkeys(
        ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon", "use_llama_pro"),
        (_NO, "the optimizer is AdamW on LoRA"),
    ),
    **dict.fromkeys(
        ("use_dft_loss", "use_asft_loss", "use_eaft_loss", "train_on_prompt", "neat_packing", "packing", "shift_attn"),
        (_NO, "the loss is that of each example's answer, one example a row"),
    ),
    "mask_history": (_NO, "an example is one prompt and one answer"),
    "ignore_pad_token_for_loss": ((True, None), "padding has no loss"),
    "label_smoothing_factor": ((0, None), "the loss is plain cross entropy"),
    "neftune_noise_alpha": (_NONE, "the embeddings get no noise"),
    "moe_aux_loss_coef": ((0, None), "the loss has no part for the router"),
    "default_system": (_NONE, "a system message is in the data: system"),
    "tool_format": (_NONE, "the template is the tokenizer's own"),
    "enable_thinking": ((True, None), "the template is the tokenizer's own"),
    "tokenized_path": (_NONE, "dataset is a file of texts"),
    "streaming": (_NO, "dataset is read as a whole"),
    "mix_strategy": (("concat",), "several data sets follow each other"),
    "interleave_probs": (_NONE, "several data sets follow each other"),
    "disable_shuffling": (_NO, "every epoch is shuffled by seed"),
    "group_by_length": (_NO, "every epoch is shuffled by seed"),
    "data_seed": (_NONE, "seed orders the examples as well"),
    "dataloader_drop_last": (_NO, "an epoch has all examples"),
    "auto_find_batch_size": (_NO, "the batch is per_device_train_batch_size"),
    "model_revision": (("main", None), "it is the main one"),
    "rope_scaling": (_NONE, "the model stays as it is"),
    "resize_vocab": (_NO, "the model stays as it is"),
    "add_tokens": (_NONE, "the tokenizer stays as it is"),
    "add_special_tokens": (_NONE, "the tokenizer stays as it is"),
    "split_special_tokens": (_NO, "the tokenizer stays as it is"),
    "upcast_layernorm": (_NO, "the model has one dtype, torch_dtype"),
    "train_from_scratch": (_NO, "LoRA trains beside a model's weights"),
    "mixture_of_depths": (_NONE, "the model stays as it is"),
    "kt_use_lora_experts": (_NO, "the routed experts have LoRA of their own, lora_target: all"),
    "kt_non_expert_weight_path": (_NONE, "all weights come from model_name_or_path"),
    "kt_expert_checkpoint_path": (_NONE, "kt_weight_path names a checkpoint of experts"),
    "kt_expert_weight_format": (("bf16", None), "kt_backend says how the experts are held"),
    "kt_config": (_NONE, "kt_num_threads, kt_tp_enabled and kt_tp_count are keys of their own"),
}


def sort_out(given: Mapping[str, Any], own: Sequence[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """(the keys among `own`, notes on keys that make no difference, problems with all others), one line each."""
    kept: dict[str, Any] = {}
    notes, problems = [], []
    for key, value in given.items():
        name = str(key)
        if name in own:
            kept[name] = value
        elif name in _SAME:
            same = _SAME[name]
            if given.get(same, value) != value:
                problems.append(f"{name} {value} and {same} {given[same]} are the same key: give one of them")
            kept[same] = value
            notes.append(f"{name}: {_for_note(name, value)} is used as {same}")
        elif name in _UNUSED:
            notes.append(f"{name}: {_for_note(name, value)} is not used: {_UNUSED[name]}")
        elif name in _ONE_EFFECT:
            problems += filter(None, [why_not(name, value)])
        else:
            problems.append(f"unknown key {name!r}{_hint(name, own)}")
    if given.get("bf16") is True and given.get("torch_dtype", "bfloat16") != "bfloat16":
        problems.append(f"bf16 is true and torch_dtype {given['torch_dtype']}: they are the same key, give one of them")
    elif given.get("bf16") is False:
        notes.append(f"bf16: False is not used: torch_dtype is {given.get('torch_dtype', 'bfloat16')}")
    return kept, notes, problems


def _for_note(name: str, value: Any) -> str:
    """A value as a note shows it, in one short line. Logs keep notes, so a token or a key is left out."""
    secret = name.endswith(("token", "secret", "_key", "webhook_url"))
    return "…" if secret and value else shown_line(str(value), 200)


def why_not(name: str, value: Any) -> str:
    """Why the key `name`, which has one effect here, cannot have `value`; "" where it can."""
    accepted, reason = _ONE_EFFECT[name]
    same = any(type(value) is type(one) and value == one for one in _with_floats(accepted))
    return "" if same else f"{name} got {value!r}: {reason}; leave it out"


def _with_floats(values: tuple[object, ...]) -> tuple[object, ...]:
    return (*values, *(float(value) for value in values if type(value) is int))


def _hint(name: str, own: Sequence[str]) -> str:
    """What an unknown key may mean: nearly the same letters, or a part of one known key alone."""
    words = set(name.lower().replace("-", "_").split("_"))
    parts = [known for known in own if words < set(known.split("_"))]
    known = [*own, *_UNUSED, *_ONE_EFFECT]
    near = difflib.get_close_matches(name.lower(), known, 1, cutoff=0.8) or (parts if len(parts) == 1 else [])
    if not near:
        return f"; {document('training')} lists the keys"
    unused = f" It is not used: {_UNUSED[near[0]]}" if near[0] in _UNUSED else ""
    return f"; did you mean {near[0]}?{unused}"
