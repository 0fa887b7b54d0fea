"""Tiny random models of the architectures that people convert, and inputs of each kind that they take.

A config gets small values for whatever its class calls a width, a depth, or a number of heads; what does not go
together then is said in the table. No file, and no name of a model on the Hub, is needed.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from llmint8.converter.model.inputs import runs

VOCABULARY = 320
_WIDTH, _HEADS, _IMAGE, _PATCH = 64, 4, 32, 8
_NAMES = {
    _WIDTH: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim projection_dim "
    "encoder_hidden_size "
    "shared_projection_dim out_hidden_size lru_width entity_emb_size pooler_output_size",
    96: "speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim expert_ffn_hidden_size "
    "feed_forward_size intermediate_size ffn_dim d_ff hidden_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
    "d_inner n_inner "
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_dim shared_intermediate_size",
    _HEADS: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_key_value_heads num_local_experts num_experts n_routed_experts moe_num_experts num_encoder_attention_heads "
    "num_decoder_attention_heads linear_num_heads linear_num_key_heads linear_num_value_heads index_n_heads "
    "speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads n_mamba_heads "
    "encoder_num_attention_heads decoder_num_attention_heads",
    2: "speech_encoder_layers t2u_encoder_layers t2u_decoder_layers num_adapter_layers encoder_num_hidden_layers "
    "decoder_num_hidden_layers num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_decoder_layers depth "
    "num_experts_per_tok moe_k num_encoder_layers decoder_start_token_id eos_token_id",
    _WIDTH
    // _HEADS: "head_dim d_kv d_head qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input attention_head_size",
    32: "kv_lora_rank q_lora_rank conv_depthwise_kernel_size num_conv_pos_embeddings laurel_rank unit_embed_dim "
    "lang_embed_dim spkr_embed_dim",
    128: "max_position_embeddings n_positions max_source_positions max_target_positions",
    1: "pad_token_id",
    0: "bos_token_id",
    _IMAGE: "image_size",
    _PATCH: "patch_size",
    VOCABULARY: "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size t2u_vocab_size char_vocab_size "
    "entity_vocab_size unit_hifi_gan_vocab_size pronunciation_vocab_size shape_vocab_size",
}
_SIZES = {name: value for value, names in _NAMES.items() for name in names.split()}


def tiny_config(cls: Any, **changes: Any) -> Any:
    """Return a config of a class with small sizes, in the configs within it too, and with these values."""
    names = inspect.signature(cls.__init__).parameters
    values = {name: _SIZES[name] for name in names if name in _SIZES}
    for name, part in (getattr(cls, "sub_configs", None) or {}).items():
        if name in names and part is not transformers.AutoConfig:
            values[name] = tiny_config(part)
    for name, value in changes.items():
        part = values.get(name)
        if isinstance(value, tuple) and isinstance(value[0], str):  # of a part that may be of any class
            value = tiny_config(getattr(transformers, value[0]), **value[1])
        values[name] = tiny_config(type(part), **value) if isinstance(value, dict) and part is not None else value
    return cls(**values)


_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_WAV = {"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}
# name -> class, what its config needs beside small sizes.
TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    # decoders
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {}),
    "ministral": ("MinistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3-next": ("Qwen3NextForCausalLM", {"layer_types": ["linear_attention", "full_attention"]}),
    "qwen3.5": ("Qwen3_5ForCausalLM", {"layer_types": ["linear_attention", "full_attention"]}),
    "gemma": ("GemmaForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", {}),
    "gemma3": ("Gemma3ForCausalLM", {}),
    "gemma3n": (
        "Gemma3nForCausalLM",
        {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma4": ("Gemma4ForCausalLM", {}),
    "recurrent-gemma": ("RecurrentGemmaForCausalLM", {"num_hidden_layers": 3}),
    "phi": ("PhiForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {}),
    "stablelm": ("StableLmForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "cohere": ("CohereForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", {}),
    "olmo": ("OlmoForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {}),
    "glm": ("GlmForCausalLM", {}),
    "glm4": ("Glm4ForCausalLM", {}),
    "nemotron": ("NemotronForCausalLM", {}),
    "persimmon": ("PersimmonForCausalLM", {}),
    "helium": ("HeliumForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "exaone4": ("Exaone4ForCausalLM", {}),
    "ernie4.5": ("Ernie4_5ForCausalLM", {}),
    "seed-oss": ("SeedOssForCausalLM", {}),
    "apertus": ("ApertusForCausalLM", {}),
    "arcee": ("ArceeForCausalLM", {}),
    "diffllama": ("DiffLlamaForCausalLM", {}),
    "bitnet": ("BitNetForCausalLM", {}),
    "nanochat": ("NanoChatForCausalLM", {}),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", {}),
    "minicpm3": ("MiniCPM3ForCausalLM", {}),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", {}),
    "opt": ("OPTForCausalLM", {}),
    "opt-350m": ("OPTForCausalLM", {"word_embed_proj_dim": 32}),
    "bloom": ("BloomForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "openai-gpt": ("OpenAIGPTLMHeadModel", {}),
    "gpt-neo": ("GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]]}),
    "gpt-neox": ("GPTNeoXForCausalLM", {}),
    "gpt-neox-japanese": ("GPTNeoXJapaneseForCausalLM", {}),
    "gptj": ("GPTJForCausalLM", {"rotary_dim": 8}),
    "codegen": ("CodeGenForCausalLM", {"rotary_dim": 8}),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", {}),
    "falcon": ("FalconForCausalLM", {}),
    "mpt": ("MptForCausalLM", {}),
    "xglm": ("XGLMForCausalLM", {}),
    "ctrl": ("CTRLLMHeadModel", {}),
    "biogpt": ("BioGptForCausalLM", {}),
    "rwkv": ("RwkvForCausalLM", {}),
    "mamba": ("MambaForCausalLM", {"state_size": 8}),
    "mamba2": (
        "Mamba2ForCausalLM",
        {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16, "chunk_size": 16},
    ),
    "falcon-mamba": ("FalconMambaForCausalLM", {}),
    "xlstm": ("xLSTMForCausalLM", {"qk_dim_factor": 1.0}),
    "bamba": ("BambaForCausalLM", {"attn_layer_indices": [1]}),
    "jamba": ("JambaForCausalLM", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "zamba2": (
        "Zamba2ForCausalLM",
        {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8, "mamba_d_state": 16},
    ),
    "falcon-h1": ("FalconH1ForCausalLM", {}),
    "lfm2": ("Lfm2ForCausalLM", {}),
    "granite-moe-hybrid": ("GraniteMoeHybridForCausalLM", {"layer_types": ["mamba", "attention"]}),
    "nemotron-h": ("NemotronHForCausalLM", {}),
    "kimi-linear": (
        "KimiLinearForCausalLM",
        {"n_shared_experts": 1, "layer_types": ["linear_attention", "full_attention"]},
    ),
    # mixtures of experts
    "mixtral": ("MixtralForCausalLM", {}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {}),
    "olmoe": ("OlmoeForCausalLM", {}),
    "phimoe": ("PhimoeForCausalLM", {}),
    "granite-moe": ("GraniteMoeForCausalLM", {}),
    "jetmoe": ("JetMoeForCausalLM", {}),
    "deepseek-v2": ("DeepseekV2ForCausalLM", {}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", {}),
    "deepseek-v32": ("DeepseekV32ForCausalLM", {}),
    "dots1": ("Dots1ForCausalLM", {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    "dots3-note": ("Dots3NoteForCausalLM", {}),
    "glm4-moe": ("Glm4MoeForCausalLM", {}),
    "gpt-oss": ("GptOssForCausalLM", {}),
    "llama4": ("Llama4ForCausalLM", {}),
    "minimax": ("MiniMaxForCausalLM", {}),
    "minimax-m2": ("MiniMaxM2ForCausalLM", {}),
    "ernie4.5-moe": ("Ernie4_5_MoeForCausalLM", {}),
    "hunyuan-moe": ("HunYuanMoEV1ForCausalLM", {}),
    "longcat-flash": ("LongcatFlashForCausalLM", {}),
    "flex-olmo": ("FlexOlmoForCausalLM", {}),
    "doge": ("DogeForCausalLM", {}),
    # encoders
    "bert": ("BertForMaskedLM", {}),
    "roberta": ("RobertaForMaskedLM", {}),
    "camembert": ("CamembertForMaskedLM", {}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", {}),
    "xlm-roberta-xl": ("XLMRobertaXLForMaskedLM", {}),
    "data2vec-text": ("Data2VecTextForMaskedLM", {}),
    "roberta-prelayernorm": ("RobertaPreLayerNormForMaskedLM", {}),
    "xmod": ("XmodForMaskedLM", {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"}),
    "albert": ("AlbertForMaskedLM", {}),
    "distilbert": ("DistilBertForMaskedLM", {}),
    "electra": ("ElectraForMaskedLM", {}),
    "ernie": ("ErnieForMaskedLM", {}),
    "deberta": ("DebertaForMaskedLM", {}),
    "deberta-v2": ("DebertaV2ForMaskedLM", {}),
    "mpnet": ("MPNetForMaskedLM", {}),
    "mpnet-body": ("MPNetModel", {}),
    "modernbert": ("ModernBertForMaskedLM", {}),
    "eurobert": ("EuroBertForMaskedLM", {}),
    "nomic-bert": ("NomicBertForMaskedLM", {}),
    "gte": ("GteForMaskedLM", {}),
    "jina-v3": ("JinaEmbeddingsV3ForMaskedLM", {}),
    "megatron-bert": ("MegatronBertForMaskedLM", {}),
    "mobilebert": ("MobileBertForMaskedLM", {}),
    "squeezebert": ("SqueezeBertForMaskedLM", {}),
    "convbert": ("ConvBertForMaskedLM", {}),
    "funnel": ("FunnelForMaskedLM", {}),
    "fnet": ("FNetForMaskedLM", {}),
    "big-bird": ("BigBirdForMaskedLM", {}),
    "longformer": ("LongformerForMaskedLM", {}),
    "nystromformer": ("NystromformerForMaskedLM", {}),
    "yoso": ("YosoForMaskedLM", {}),
    "mra": ("MraForMaskedLM", {}),
    "ibert": ("IBertForMaskedLM", {}),
    "luke": ("LukeForMaskedLM", {}),
    "layoutlm": ("LayoutLMForMaskedLM", {}),
    "rembert": ("RemBertForMaskedLM", {}),
    "roformer": ("RoFormerForMaskedLM", {}),
    "roc-bert": ("RoCBertForMaskedLM", {"pronunciation_embed_dim": 32, "shape_embed_dim": 32}),
    "esm": ("EsmForMaskedLM", {}),
    "flaubert": ("FlaubertWithLMHeadModel", {"emb_dim": 64}),
    "xlm": ("XLMWithLMHeadModel", {"emb_dim": 64}),
    "xlnet": ("XLNetLMHeadModel", {}),
    "reformer": (
        "ReformerModelWithLMHead",
        {
            "is_decoder": True,
            "axial_pos_shape": (8, 16),
            "axial_pos_embds_dim": (16, 48),
            "attn_layers": ["local", "lsh"],
            "num_buckets": 4,
        },
    ),
    "perceiver": (
        "PerceiverForMaskedLM",
        {
            "num_latents": 8,
            "d_latents": 64,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "qk_channels": 64,
            "v_channels": 64,
            "vocab_size": 262,
        },
    ),
    "canine": ("CanineModel", {}),
    "bert-classifier": ("BertForSequenceClassification", {}),
    "llama-classifier": ("LlamaForSequenceClassification", {}),
    # encoders with decoders
    "t5": ("T5ForConditionalGeneration", {}),
    "t5-gated": ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}),
    "t5-encoder": ("T5EncoderModel", {}),
    "mt5": ("MT5ForConditionalGeneration", {}),
    "umt5": ("UMT5ForConditionalGeneration", {}),
    "longt5": ("LongT5ForConditionalGeneration", {}),
    "switch": ("SwitchTransformersForConditionalGeneration", {}),
    "t5gemma": ("T5GemmaForConditionalGeneration", {}),
    "bart": ("BartForConditionalGeneration", {}),
    "mbart": ("MBartForConditionalGeneration", {}),
    "plbart": ("PLBartForConditionalGeneration", {}),
    "mvp": ("MvpForConditionalGeneration", {}),
    "blenderbot": ("BlenderbotForConditionalGeneration", {}),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration", {}),
    "pegasus": ("PegasusForConditionalGeneration", {}),
    "pegasus-x": ("PegasusXForConditionalGeneration", {}),
    "bigbird-pegasus": ("BigBirdPegasusForConditionalGeneration", {}),
    "marian": ("MarianMTModel", {}),
    "m2m-100": ("M2M100ForConditionalGeneration", {}),
    "nllb-moe": ("NllbMoeForConditionalGeneration", {}),
    "fsmt": ("FSMTForConditionalGeneration", {"decoder_start_token_id": 2}),
    "led": ("LEDForConditionalGeneration", {}),
    "prophetnet": ("ProphetNetForConditionalGeneration", {}),
    "seamless-m4t": ("SeamlessM4TForTextToText", {}),
    "seamless-m4t-v2": ("SeamlessM4Tv2ForTextToText", {}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", {}),
    "deit": ("DeiTForImageClassification", {}),
    "beit": ("BeitForImageClassification", {}),
    "data2vec-vision": ("Data2VecVisionForImageClassification", {}),
    "dinov2": ("Dinov2ForImageClassification", {}),
    "dinov3": ("DINOv3ViTModel", {}),
    "vit-mae": ("ViTMAEModel", {}),
    "swin": (
        "SwinForImageClassification",
        {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    ),
    "segformer": (
        "SegformerForImageClassification",
        {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
    ),
    "hiera": (
        "HieraForImageClassification",
        {
            "embed_dim": 32,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 4],
            "image_size": [64, 64],
            "patch_size": [7, 7],
        },
    ),
    "dpt": (
        "DPTForDepthEstimation",
        {
            "image_size": 32,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 32, 32, 64],
            "fusion_hidden_size": 16,
        },
    ),
    "yolos": ("YolosForObjectDetection", {"image_size": [32, 48], "num_detection_tokens": 5}),
    "clip": ("CLIPModel", {}),
    "clip-vision": ("CLIPVisionModel", {}),
    "clip-text": ("CLIPTextModel", {}),
    "siglip": ("SiglipModel", {}),
    "siglip2": ("Siglip2Model", {}),
    "chinese-clip": ("ChineseCLIPModel", {}),
    "altclip": ("AltCLIPModel", {}),
    "wav2vec2": ("Wav2Vec2ForCTC", _WAV),
    "wav2vec2-bert": ("Wav2Vec2BertForCTC", {}),
    "wav2vec2-conformer": ("Wav2Vec2ConformerForCTC", _WAV),
    "hubert": ("HubertForCTC", _WAV),
    "wavlm": ("WavLMForCTC", _WAV),
    "unispeech-sat": ("UniSpeechSatForCTC", _WAV),
    "sew": (
        "SEWForCTC",
        _WAV | {"squeeze_factor": 2, "conv_stride": [5, 2, 2, 2, 2, 2, 2], "conv_kernel": [10, 3, 3, 3, 3, 2, 2]},
    ),
    "ast": ("ASTForAudioClassification", {}),
    "whisper": ("WhisperForConditionalGeneration", {}),
    "speech-to-text": ("Speech2TextForConditionalGeneration", {}),
    "speecht5": ("SpeechT5ForSpeechToText", _WAV),
    "moonshine": ("MoonshineForConditionalGeneration", {}),
    "seamless-speech": ("SeamlessM4Tv2ForSpeechToText", {}),
    "llava": (
        "LlavaForConditionalGeneration",
        {"text_config": ("LlamaConfig", {}), "vision_config": ("CLIPVisionConfig", {}), "image_token_index": 300},
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        {"text_config": ("GemmaConfig", {}), "vision_config": ("SiglipVisionConfig", {}), "image_token_index": 300},
    ),
    "gemma3-vision": (
        "Gemma3ForConditionalGeneration",
        {"vision_config": ("SiglipVisionConfig", {}), "image_token_index": 300, "mm_tokens_per_image": 4},
    ),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "image_token_id": 300,
            "video_token_id": 301,
            "vision_start_token_id": 302,
            "vision_end_token_id": 303,
            "text_config": {"rope_parameters": _MROPE},
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "image_token_id": 300,
            "video_token_id": 301,
            "vision_start_token_id": 302,
            "vision_end_token_id": 303,
            "text_config": {"rope_parameters": _MROPE},
            "vision_config": {"fullatt_block_indexes": [1], "window_size": 32},
        },
    ),
    "qwen3-vl": (
        "Qwen3VLForConditionalGeneration",
        {
            "image_token_id": 300,
            "video_token_id": 301,
            "vision_start_token_id": 302,
            "vision_end_token_id": 303,
            "text_config": {"rope_parameters": _MROPE},
            "vision_config": {"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        },
    ),
    "smolvlm": ("SmolVLMForConditionalGeneration", {"text_config": ("LlamaConfig", {}), "image_token_id": 300}),
    "idefics3": ("Idefics3ForConditionalGeneration", {"text_config": ("LlamaConfig", {}), "image_token_id": 300}),
    "blip": ("BlipForConditionalGeneration", {}),
    "blip2": (
        "Blip2ForConditionalGeneration",
        {"text_config": ("OPTConfig", {}), "image_token_index": 300, "num_query_tokens": 4},
    ),
    "git": ("GitForCausalLM", {}),
    "internvl": (
        "InternVLForConditionalGeneration",
        {
            "text_config": ("Qwen2Config", {}),
            "image_token_id": 300,
            "vision_config": {"image_size": [32, 32], "patch_size": [8, 8]},
        },
    ),
    "qwen2-audio": (
        "Qwen2AudioForConditionalGeneration",
        {"text_config": ("Qwen2Config", {}), "audio_config": ("Qwen2AudioEncoderConfig", {}), "audio_token_index": 300},
    ),
    "voxtral": (
        "VoxtralForConditionalGeneration",
        {
            "text_config": ("LlamaConfig", {}),
            "audio_config": ("VoxtralEncoderConfig", {"intermediate_size": 256}),
            "audio_token_id": 300,
        },
    ),
    "trocr": ("VisionEncoderDecoderModel", {"encoder": ("ViTConfig", {}), "decoder": ("TrOCRConfig", {})}),
    "flava": ("FlavaModel", {}),
    "vilt": ("ViltModel", {}),
    "layoutlmv3": ("LayoutLMv3Model", {"coordinate_size": 12, "shape_size": 8, "input_size": 32}),
    "pix2struct": ("Pix2StructForConditionalGeneration", {}),
}
TABLE = TEXT | OTHERS


def tiny_model(name: str, seed: int = 0) -> Any:
    """Build a model of the table with random weights of a size at which layers matter, float16 values in float32."""
    cls_name, changes = TABLE[name]
    cls = getattr(transformers, cls_name)
    torch.manual_seed(seed)
    model = cls(tiny_config(cls.config_class, **changes)).eval()
    return model


def save(model: Any, path: Path) -> None:
    """Write a model as a float16 checkpoint, its weights drawn so that every layer matters and no bias is zero."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                fan_in = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
                module.weight.normal_(0, fan_in**-0.5)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1)
        for parameter in model.parameters():  # buffers may hold what no half can
            parameter.data = parameter.data.half()
    model.config.dtype = torch.float16
    model.save_pretrained(path)


_DRAWN = ("pixel_values", "input_features", "input_values")


def outputs(model: Any) -> Tensor:
    """Return what a model in float32 gives for a text, images or sounds, whichever it takes, in one row.

    They are drawn here, and not what the converter shows to a model.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 256, (8, 24), generator=generator)
    found: dict[str, Tensor] = {}
    errors = []
    for module in model.modules():
        if isinstance(getattr(module, "config", None), transformers.PreTrainedConfig):
            module.config.use_cache = False  # some caches ask for layers that a model of two has not
    for what, method, arguments in runs(model, tokens):
        drawn = {
            name: torch.randn(value.shape, generator=generator) if name in _DRAWN else value
            for name, value in arguments.items()
        }
        torch.manual_seed(2)  # some models draw numbers on the way
        if what in found:
            continue
        try:
            with torch.no_grad():
                output = (model if method == "forward" else getattr(model, method))(**drawn)
        except Exception as error:  # another form of the same may do
            errors.append(f"{what}: {error}")
            continue
        leaves = [output["logits"]] if isinstance(output, dict) and "logits" in output else tree_leaves(output)
        floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        found[what] = torch.cat([leaf.float().flatten() for leaf in floats])
    assert found, errors
    return torch.cat(list(found.values()))
