"""`stream_chat`: the text arrives in pieces, the numbers are right, errors come through."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from llmint8.formats import LLMInt8Error
from llmint8.runtime.model import compiled
from llmint8.runtime.model.generate import Generation, require_text_model, statistics, stream_chat

WORDS = {f"w{i}": i for i in range(96)} | {"abcdef": 96}  # transformers looks for stop strings with the last one
CHAT = "{% for m in messages %}w7 {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w8 w9{% endif %}"


@pytest.fixture
def tokenizer() -> Any:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2", unk_token="w0")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=97, initializer_range=0.5, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None  # the length is then what was asked for
    return model


def test_pieces_make_up_the_greedy_text(model: Any, tokenizer: Any) -> None:
    model.generation_config.update(do_sample=True, temperature=2.0, top_k=40)  # greedy all the same
    pieces: list[str] = []
    done = stream_chat(model, tokenizer, "w3 w4 w5", pieces.append, max_new_tokens=12)
    prompt = torch.tensor([[3, 4, 5]])
    tokens = prompt
    for _ in range(12):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert "".join(pieces) == done.text == tokenizer.decode(tokens[0, 3:], skip_special_tokens=True)
    assert len(pieces) > 3
    assert "" not in pieces
    assert (done.prompt_tokens, done.new_tokens) == (3, 12)
    assert done.seconds > 0


def test_chat_template_is_used_unless_told_not_to(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    chat = stream_chat(model, tokenizer, "w3 w4 w5", lambda text: None, max_new_tokens=5)
    assert chat.prompt_tokens == 6
    by_hand = stream_chat(
        model, tokenizer, "w7 w3 w4 w5 w8 w9", lambda text: None, max_new_tokens=5, chat_template=False
    )
    assert (by_hand.prompt_tokens, by_hand.text) == (6, chat.text)


def test_temperature_draws(model: Any, tokenizer: Any) -> None:
    texts = set()
    for seed in (0, 0, 1, 2):
        torch.manual_seed(seed)
        texts.add(stream_chat(model, tokenizer, "w3", lambda text: None, max_new_tokens=20, temperature=1.5).text)
    assert len(texts) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 2, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"assistant_early_exit": 1},
        {"constraints": []},
        {"force_words_ids": [[5]], "num_beams": 2},
        {"guidance_scale": 3.0},
        {"max_length": 3, "max_time": 1e-9},
        {"cache_implementation": "quantized"},
        {"token_healing": True},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_one_text_comes_whatever_the_generation_config_asks_for(
    settings: dict[str, Any], temperature: float, model: Any, tokenizer: Any, recwarn: pytest.WarningsRecorder
) -> None:
    def generate() -> Generation:
        torch.manual_seed(0)
        return stream_chat(model, tokenizer, "w3", lambda text: None, max_new_tokens=9, temperature=temperature)

    if "top_k" in settings and temperature:
        model.generation_config.top_k = settings["top_k"]  # that is about drawing
    plain = generate()
    for name, value in settings.items():  # `update` checks them, a file is not checked
        setattr(model.generation_config, name, value)
    config = model.generation_config
    found = generate()
    assert (found.text, found.new_tokens) == (plain.text, 9)
    assert model.generation_config is config
    assert not recwarn.list


def test_what_the_generation_config_says_of_the_text_holds(model: Any, tokenizer: Any) -> None:
    def words(**settings: Any) -> list[str]:
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        return stream_chat(model, tokenizer, "w3", lambda text: None, max_new_tokens=12).text.split()

    first = words()[0]
    assert first not in words(suppress_tokens=[WORDS[first]])
    assert len(words(suppress_tokens=None, stop_strings=[first])) == 1
    assert len(set(words(stop_strings=None, no_repeat_ngram_size=1))) == 12


def test_only_what_every_model_takes_is_given_to_it(model: Any, tokenizer: Any) -> None:
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in tokenizer("w3", return_token_type_ids=True)
    assert stream_chat(model, tokenizer, "w3", lambda text: None, max_new_tokens=2).new_tokens == 2


def test_a_chat_template_that_fails_is_one_line(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('only for assistants') }}"
    with pytest.raises(LLMInt8Error, match=r"template cannot be applied \(TemplateError: only for .*--no-chat"):
        stream_chat(model, tokenizer, "w3", lambda text: None)
    assert stream_chat(model, tokenizer, "w3", lambda text: None, chat_template=False, max_new_tokens=1).new_tokens


def _sizes(**more: int) -> dict[str, int]:
    return {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, **more}


@pytest.mark.parametrize(
    ("config", "architecture", "words"),
    [
        (transformers.BertConfig(**_sizes()), "BertForMaskedLM", "BertForMaskedLM does not generate text"),
        (transformers.BertConfig(**_sizes()), "BertModel", "BertModel does not generate text"),
        (transformers.LlamaConfig(**_sizes()), "LlamaModel", "LlamaModel does not generate text"),
        (transformers.LlamaConfig(**_sizes()), "LlamaForSequenceClassification", "does not generate text"),
        (transformers.ViTConfig(**_sizes()), "ViTForImageClassification", "does not generate text"),
        (transformers.WhisperConfig(), "WhisperForConditionalGeneration", "takes input_features"),
        (transformers.LlamaConfig(**_sizes()), "LlamaForCausalLM", None),
        (transformers.T5Config(), "T5ForConditionalGeneration", None),
    ],
    ids=lambda value: value if isinstance(value, str) and "For" in value else "",
)
def test_a_model_that_does_not_continue_text_is_told_before_it_is_loaded(
    config: Any, architecture: str, words: str | None, tmp_path: Path
) -> None:
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)  # there are no weights
    if words is None:
        require_text_model(tmp_path)
        return
    with pytest.raises(LLMInt8Error, match=words):
        require_text_model(tmp_path)


def test_stops_at_the_end_token(model: Any, tokenizer: Any) -> None:
    first = stream_chat(model, tokenizer, "w3 w4", lambda text: None, max_new_tokens=1).text
    model.generation_config.eos_token_id = WORDS[first]
    assert stream_chat(model, tokenizer, "w3 w4", lambda text: None, max_new_tokens=9).new_tokens == 1


def test_encoder_decoder_counts_its_own_tokens(tokenizer: Any) -> None:
    torch.manual_seed(1)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=97, **sizes)).eval()
    model.generation_config.update(eos_token_id=None, decoder_start_token_id=0)
    done = stream_chat(model, tokenizer, "w3 w4 w5 w6", lambda text: None, max_new_tokens=5)
    assert (done.prompt_tokens, done.new_tokens) == (4, 5)


def test_errors_come_through(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise OSError("broken pipe")

    with pytest.raises(OSError, match="broken pipe"):
        stream_chat(model, tokenizer, "w3", fail, max_new_tokens=4)
    monkeypatch.setattr(model.lm_head, "forward", fail)
    with pytest.raises(OSError, match="broken pipe"):
        stream_chat(model, tokenizer, "w3", lambda text: None, max_new_tokens=4)


def test_invalid_arguments(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"temperature is -1\.0"):
        stream_chat(model, tokenizer, "w3", lambda text: None, temperature=-1.0)
    with pytest.raises(ValueError, match="prompt is '  '"):
        stream_chat(model, tokenizer, "  ", lambda text: None)


def test_statistics_leave_the_compilation_out_of_the_speed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Generation("w1", prompt_tokens=7, new_tokens=5, token_seconds=[0.5, 30.0, 40.0, 40.25, 40.5])
    first, speed = "First token    0.50 s, after 7 tokens of prompt", "Then           4.0 tokens per second, 5 in all"
    assert statistics(model, done)[:2] == [first, speed]
    monkeypatch.setattr(compiled, "_cpp_compiler", lambda: "g++")
    assert compiled.compile_decode(model)
    assert statistics(model, done)[:3] == [first, "Compilation    39.5 s, with two more tokens", speed]
    assert statistics(model, done)[3:] == statistics(model, done)[-1:]
    assert statistics(model, done)[-1].startswith("Memory         ")
    short = Generation("w1", prompt_tokens=7, new_tokens=2, token_seconds=[0.5, 30.0])
    assert [line.split()[0] for line in statistics(model, short)] == ["First", "Memory"]


def test_statistics_on_a_gpu_have_the_peak_of_its_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = SimpleNamespace(device=torch.device("cuda:1"), generation_config=model.generation_config)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10**9 * (1 + device.index))
    done = Generation("w1", prompt_tokens=7, new_tokens=1, token_seconds=[0.5])
    assert "GPU memory     2.00 GB at most" in statistics(there, done)


def test_statistics_follow_from_a_generation(model: Any, tokenizer: Any) -> None:
    done = stream_chat(model, tokenizer, "w3 w4 w5", lambda text: None, max_new_tokens=6)
    assert len(done.token_seconds) == 6
    assert done.token_seconds == sorted(done.token_seconds)
    assert [line.split()[0] for line in statistics(model, done)] == ["First", "Then", "Memory"]
