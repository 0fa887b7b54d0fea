"""The sizes that `llmint8 plan` knows by name: each is built with two blocks, without weights, and counted."""

from typing import Any

from llmint8.converter.model.build import meta_model
from llmint8.runtime.placement.blocks import block_of
from llmint8.runtime.placement.cache import most_tokens
from llmint8.runtime.placement.known import KNOWN, known_config

# Parameters, what is tied counted once, and the longest text, as each is published.
SIZES: dict[str, tuple[int, int | None]] = {
    "opt-125m": (125_239_296, 2_048),
    "opt-350m": (331_196_416, 2_048),
    "opt-1.3b": (1_315_758_080, 2_048),
    "opt-2.7b": (2_651_596_800, 2_048),
    "opt-6.7b": (6_658_473_984, 2_048),
    "opt-13b": (12_853_473_280, 2_048),
    "opt-30b": (29_974_540_288, 2_048),
    "opt-66b": (65_719_701_504, 2_048),
    "opt-175b": (174_604_468_224, 2_048),
    "bloom-560m": (559_214_592, None),
    "bloom-1b1": (1_065_314_304, None),
    "bloom-1b7": (1_722_408_960, None),
    "bloom-3b": (3_002_557_440, None),
    "bloom-7b1": (7_069_016_064, None),
    "bloom-176b": (176_247_271_424, None),
    "t5-small": (60_506_624, None),
    "t5-base": (222_903_552, None),
    "t5-large": (737_668_096, None),
    "t5-3b": (2_851_598_336, None),
    "t5-11b": (11_307_321_344, None),
    "gpt2": (124_439_808, 1_024),
    "gpt2-medium": (354_823_168, 1_024),
    "gpt2-large": (774_030_080, 1_024),
    "gpt2-xl": (1_557_611_200, 1_024),
    "gpt-j-6b": (6_050_882_784, 2_048),
    "gpt-neox-20b": (20_554_567_680, 2_048),
    "llama-7b": (6_738_415_616, 2_048),
    "llama-13b": (13_015_864_320, 2_048),
    "llama-30b": (32_528_943_616, 2_048),
    "llama-65b": (65_285_660_672, 2_048),
    "llama-2-7b": (6_738_415_616, 4_096),
    "llama-2-13b": (13_015_864_320, 4_096),
    "llama-2-70b": (68_976_648_192, 4_096),
    "llama-3-8b": (8_030_261_248, 8_192),
    "llama-3-70b": (70_553_706_496, 8_192),
    "llama-3.1-8b": (8_030_261_248, 131_072),
    "llama-3.1-70b": (70_553_706_496, 131_072),
    "llama-3.1-405b": (405_853_388_800, 131_072),
    "llama-3.2-1b": (1_235_814_400, 131_072),
    "llama-3.2-3b": (3_212_749_824, 131_072),
    "mistral-7b": (7_248_023_552, 32_768),
    "mixtral-8x7b": (46_702_792_704, 32_768),
    "mixtral-8x22b": (140_620_634_112, 65_536),
    "qwen2.5-0.5b": (494_032_768, 32_768),
    "qwen2.5-1.5b": (1_543_714_304, 32_768),
    "qwen2.5-3b": (3_085_938_688, 32_768),
    "qwen2.5-7b": (7_615_616_512, 32_768),
    "qwen2.5-14b": (14_770_033_664, 32_768),
    "qwen2.5-32b": (32_763_876_352, 32_768),
    "qwen2.5-72b": (72_706_203_648, 32_768),
}


def test_sizes_that_are_known_by_name_are_those_that_are_published() -> None:
    assert {name: _size(known_config(name)) for name in KNOWN} == SIZES


def _size(config: Any) -> tuple[int, int | None]:
    """Return parameters and tokens. All blocks of a model but the first, which T5 gives more to, have as many."""
    blocks = config.num_hidden_layers
    for name in {config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), "num_decoder_layers"}:
        if hasattr(config, name):
            setattr(config, name, 2)
    model: Any = meta_model(config)
    times = {True: blocks - 1, False: 1}
    parameters = model.named_parameters()
    found = sum(one.numel() * times[(block_of(name) or "").endswith(".1")] for name, one in parameters)
    return found, most_tokens(model)
