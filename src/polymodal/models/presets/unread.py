"""Keys of a checkpoint's config that its translation does not read, and that nobody has looked at.

A translation reads the keys that it knows. Newer versions of the reference library add keys, and one of those may
change what is computed; a checkpoint that has one must not be read in silence as if it had not.

Which keys are read is found by asking: a value in whose place something unusable stands, and which changes nothing, is
not read. So no list of the keys that a translation reads can fall behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.presets.architecture import Architecture
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.released import KEY

_ORIGIN = """
    _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path architectures
    attn_implementation dtype finetuning_task gradient_checkpointing id2label is_composition label2id
    model_type name num_labels problem_type return_dict tf_legacy_loss tokenizer_class torch_dtype torchscript
    transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
"""Where a checkpoint comes from, what its labels are called, how the reference library runs it."""
_SPECIAL = """
    audio_token_id audio_token_index bos_token_id decoder_start_token_id eos_token_id image_token_id image_token_index
    mask_token_id pad_token_id sep_token_id unk_token_id video_token_id video_token_index image_seq_length
"""
"""Ids and lengths that come from the tokenizer, from ``generation_config.json`` or from the model's own sizes."""
_GENERATION = """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_decoder_ids forced_eos_token_id length_penalty
    max_length median_filter_width min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_past output_scores prefix remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens task_specific_params temperature top_k top_p typical_p
"""
"""How answers were drawn, in configs older than ``generation_config.json``."""
_TRAINING = """
    activation_dropout alpha_initializer alphas_initializer_range apply_spec_augment attention_dropout
    attention_probs_dropout_prob attn_pdrop ce_ignore_index channel_consistent_masking classifier_dropout codevector_dim
    contrastive_logits_temperature ctc_loss_reduction ctc_zero_infinity decoder_layerdrop diversity_loss_weight
    do_mask_input drop_path_rate dropout embd_pdrop encoder_layerdrop feat_extract_dropout feat_proj_dropout
    feat_quantizer_dropout ff_dropout final_dropout freeze_feat_extract_train freeze_lm_head freeze_text_layers
    freeze_text_module_exceptions freeze_vision_layers freeze_vision_module_exceptions global_backprop_contrastive
    global_contrastive_weight head_dropout hidden_dropout hidden_dropout_prob ignore_index init_std initializer_factor
    initializer_range itm_weight label_smoothing layerdrop logit_scale_init_value loss mask_channel_length
    mask_channel_min_space mask_channel_other mask_channel_prob mask_channel_selection mask_feature_length
    mask_feature_min_masks mask_feature_prob mask_time_length mask_time_min_masks mask_time_min_space mask_time_other
    mask_time_prob mask_time_selection mask_type mask_value mim_weight mlm_weight mmm_image_weight mmm_text_weight
    no_mask_channel_overlap no_mask_time_overlap norm_pix_loss num_forecast_mask_patches num_negatives path_dropout
    positional_dropout prompt_attention_dropout prompt_projection_dropout random_mask_ratio resid_pdrop return_loss
    skip_unmasked_multimodal_encoder summary_first_dropout unmasked_channel_indices
"""
"""What acts in training alone."""
_ELSEWHERE = """
    adapter_kernel_size adapter_stride apply_layernorm classifier_proj_size cross_attention_hidden_size
    decoder_hidden_size decoder_intermediate_size decoder_num_attention_heads decoder_num_hidden_layers dense_act_fn
    directionality distribution_output encoder_hidden_size encoder_stride image_text_hidden_size is_decoder
    is_encoder_decoder is_gated_act n_ctx n_positions num_adapter_layers
    num_codevector_groups num_codevectors_per_group num_ctc_classes num_feat_extract_layers num_parallel_samples
    num_targets out_features out_indices output_hidden_size output_range pooler_fc_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type pooling_type prediction_length pretraining_tp
    proj_codevector_dim projection_dim reorder_and_upcast_attn resampler_depth resampler_head_dim resampler_n_heads
    resampler_n_latents qk_layer_norms_perceiver reshape_hidden_states share_projection stage_names summary_activation
    summary_proj_to_labels summary_type summary_use_proj tdnn_dilation tdnn_dim tdnn_kernel tie_encoder_decoder
    tie_word_embeddings use_decoder_only_language_model use_resampler use_weighted_layer_sum vocab_size
    xvector_output_dim chunk_size_feed_forward add_cross_attention
"""
"""What other keys or the stored tensors say as well, and what belongs to heads and switches that are not in use: of
those, a translation reads the switch."""
HARMLESS = frozenset(" ".join((KEY, _ORIGIN, _SPECIAL, _GENERATION, _TRAINING, _ELSEWHERE)).split())
"""Keys, at any depth, that may stay unread."""
_SWITCHES = dict.fromkeys(("sliding_window", "max_window_layers", "layer_types"), "use_sliding_window")
_SWITCHES["hidden_act"] = "use_swiglu_ffn"
"""Keys that say nothing at one position of a switch beside them, if it is a switch that the translation reads."""
_HARMLESS_IN: Mapping[str, frozenset[str]] = {
    # The towers and the codec that a class leaves out.
    **dict.fromkeys(("clip", "siglip", "blip-2-retrieval"), frozenset(("text_config", "vision_config"))),
    "flava": frozenset(
        ("hidden_size", "layer_norm_eps", "image_codebook_config", "init_codebook", "image_codebook_config.freeze")
    ),
    "clap": frozenset(
        (
            *("hidden_size", "num_hidden_layers", "audio_config.num_classes", "audio_config.num_hidden_layers"),
            *("audio_config.projection_hidden_act", "text_config.projection_hidden_act"),
        )
    ),
    # One config for every kind of input; the library's norms do not read their epsilon from it.
    "perceiver": frozenset(
        (
            *("_label_trainable_num_channels", "audio_samples_per_frame", "d_model", "image_size", "layer_norm_eps"),
            *("max_position_embeddings", "num_frames", "output_num_channels", "output_shape", "samples_per_patch"),
            "train_size",
        )
    ),
    "blip-2": frozenset(("qformer_config.max_position_embeddings",)),
    "minigpt4": frozenset(("qformer_config.max_position_embeddings",)),
}
"""The same for one architecture, where another one computes with them."""


class _Unusable:
    """Stands in a value's place; whoever looks at it fails, or gets something else than before."""

    def __bool__(self) -> bool:
        raise TypeError("it was read")


def unread_keys(architecture: Architecture, configs: HubConfigs) -> list[str]:
    """Keys of ``config.json`` that say something, that nobody reads and that are not known to be harmless.

    Worked example: ``{"model_type": "llama", ..., "residual_multiplier": 0.5, "new_option": false}`` gives
    ``["residual_multiplier"]``.

    Args:
        architecture: the one that reads them.
        configs: of the checkpoint. Folders of packages that are not the reference library are not asked about: their
            unknown keys are errors.
    """
    if "model_type" not in configs.config or configs.model_type == "open_clip":
        return []
    # Without the folder nothing but configs is read, which costs a fraction of a millisecond each time.
    bare = replace(configs, folder=None)
    try:
        expected = architecture.to_model(bare)
    except ConfigError:
        return []
    known = HARMLESS | _HARMLESS_IN.get(architecture.name, frozenset())

    def is_read(path: tuple[str, ...]) -> bool:
        try:
            found = architecture.to_model(replace(bare, config=_with(bare.config, path)))
        except Exception:  # noqa: BLE001  (whatever a translation raises, it has looked)
            return True
        return found != expected

    def search(config: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[str]:
        for key, value in config.items():
            path = (*above, str(key))
            is_known = str(key) in known or ".".join(path) in known
            if not value or (is_known and not isinstance(value, Mapping)):
                continue
            switch = _SWITCHES.get(str(key))
            if is_read(path):
                yield from search(value, path) if isinstance(value, Mapping) else ()
            elif not is_known and not (switch and is_read((*above, switch))):
                yield ".".join(path)

    return list(search(configs.config, ()))


def _with(config: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """A config with something unusable at a path."""
    key, *rest = path
    return {**config, key: _with(config[key], tuple(rest)) if rest else _Unusable()}
