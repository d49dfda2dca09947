"""Bases of many architectures, each of a few kilobytes: accepted, or refused with the reason
beforehand.

The name of a base decides nothing, and its behaviour on a few tokens does. The README's table says the
same. Damaged files of a base or an embedder are refused in words.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

import sisa
from sisa.config.config import RunConfig, SisaBlock
from sisa.config.sources import DatasetSource
from sisa.core.domain import BaseFiles, Part, Record
from sisa.core.errors import InvalidInput, SisaError
from sisa.core.events import Event, Notice
from sisa.flows.wiring.resources import Resources
from sisa.lm.answer.base_trial import try_base
from sisa.lm.base.adapter import attach, lora_config
from sisa.lm.base.weights import _convert, base_digest, load_base, own_modules, resolve_base
from tests.endurance.mutate import some_bytes
from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import Tiny, change_run, of_people, write_run

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("bases")]

README = Path(__file__).parents[3] / "sisa" / "config" / "README.md"
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}
TAKEN: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": {**SMALL, "sliding_window": 16},
    "gpt2": GPT,
    "gpt_neox": {**SMALL, "rotary_pct": 0.5},
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_bigcode": GPT,
    "opt": {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "phi": {**SMALL, "partial_rotary_factor": 0.5, "num_key_value_heads": 2},
    "phi3": SMALL,
    "gemma": SMALL,
    "gemma2": {**SMALL, "sliding_window": 16},
    "gemma3_text": {**SMALL, "sliding_window": 16},
    "qwen2": SMALL,
    "qwen3": SMALL,
    "qwen2_moe": {
        **SMALL,
        **EXPERTS,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "olmo": SMALL,
    "olmo2": SMALL,
    "granite": SMALL,
    "stablelm": SMALL,
    "smollm3": SMALL,
    "cohere": SMALL,
    "starcoder2": SMALL,
    "nemotron": SMALL,
    "glm": SMALL,
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
}
NAMED: dict[str, dict[str, Any]] = {  # taken where `lora_target_modules` names the attention's alone
    "mixtral": {**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None},
    "olmoe": {**SMALL, **EXPERTS},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bert": (SMALL, "the base model looks ahead"),
    "xlnet": ({"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}, "the base model looks ahead"),
    "t5": ({"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2}, "not a causal language model"),
    "mamba": ({**SMALL, "state_size": 4}, "can't be run the way shards are trained and queried"),
}
TRAINING = {"lora_target_modules": "all-linear", "lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
TRAINING |= {"sequence_len": 48}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Any]], Path]:
    """Return a function that makes a base with random weights, given its `model_type`."""
    root = tmp_path_factory.mktemp("bases")
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_base(root / "tokenizer"))

    def made(kind: str, settings: dict[str, Any]) -> Path:
        from transformers import AutoModelForSeq2SeqLM

        words = {"vocab_size": len(tokenizer), "bos_token_id": None}
        words |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
        model = auto.from_config(AutoConfig.for_model(kind, **words, **settings))
        model.save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
        size = sum(each.stat().st_size for each in (root / kind).glob("*.safetensors"))
        assert size < 200_000
        return root / kind

    return made


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SISA_CACHE", str(tmp_path / "cache"))


def tried(directory: Path, **training: Any) -> None:
    found = resolve_base(str(directory))
    try_base(found, {**TRAINING, **training})


@pytest.mark.parametrize("kind", TAKEN)
def test_a_base_is_taken(make: Callable[..., Path], kind: str) -> None:
    tried(make(kind, TAKEN[kind]))


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "mixtral", "qwen2_moe"])
def test_own_modules_are_those_of_a_deep_copy_and_share_what_is_frozen(
    make: Callable[..., Path], kind: str
) -> None:
    found = resolve_base(str(make(kind, {**TAKEN, **NAMED}[kind])))
    base, _ = load_base(found)
    target = "c_attn" if kind == "gpt2" else "q_proj"
    config = lora_config({**TRAINING, "lora_target_modules": [target]}, base)
    model = attach(base, config, None, init_seed=0)
    model.register_forward_hook(print)
    frozen = {id(each): each for each in model.parameters() if not each.requires_grad}
    copied, expected = own_modules(model), copy.deepcopy(model, dict(frozen))
    own = dict(copied.named_modules())
    assert {name: type(each) for name, each in own.items()} == {
        name: type(each) for name, each in expected.named_modules()
    }
    tensors = [dict((*each.named_parameters(), *each.named_buffers())) for each in (copied, expected)]
    assert all(map(torch.equal, *(each.values() for each in tensors)))
    for name, module in model.named_modules():
        assert own[name] is not module
        assert list(vars(own[name])) == list(vars(module))
        for key, value in vars(module).items():
            theirs = vars(own[name])[key]
            assert type(theirs) is type(value)
            if isinstance(value, dict | list | set):
                assert theirs is not value
                assert len(theirs) == len(value)
    shared = {id(each) for each in copied.parameters()} & {id(each) for each in model.parameters()}
    assert shared == frozen.keys()
    assert all(each.config is copied.config for each in own.values() if hasattr(each, "layer_idx"))
    assert copied.config is not model.config


@pytest.mark.parametrize("kind", NAMED)
def test_fused_experts_get_no_adapters_and_the_attention_does(
    make: Callable[..., Path], kind: str
) -> None:
    directory = make(kind, NAMED[kind])
    with pytest.raises(InvalidInput, match="is not plain LoRA") as caught:
        tried(directory)
    assert (caught.value.where, "q_proj" in caught.value.next_step) == ("lora_target_modules", True)
    tried(directory, lora_target_modules=("q_proj", "v_proj"))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_causal_language_model_is_refused_with_the_reason(
    make: Callable[..., Path], kind: str
) -> None:
    settings, what = REFUSED[kind]
    with pytest.raises(InvalidInput, match=what):
        tried(make(kind, settings))


def test_more_tokens_than_the_base_has_positions_for_are_refused(make: Callable[..., Path]) -> None:
    for kind in ("llama", "gpt2"):
        with pytest.raises(InvalidInput) as caught:
            tried(make(kind, TAKEN[kind]), sequence_len=65)
        assert (caught.value.where, caught.value.got) == ("sequence_len", "65")
        tried(make(kind, TAKEN[kind]), sequence_len=64)


def test_the_readme_has_them_all() -> None:
    rows = dict(re.findall(r"^\| (taken|modules named|refused) \| (.*) \|$", README.read_text(), re.M))
    listed = {outcome: re.findall(r"`([a-z0-9_]+)`", row) for outcome, row in rows.items()}
    assert listed == {
        "taken": sorted(TAKEN),
        "modules named": sorted(NAMED),
        "refused": sorted(REFUSED),
    }


FEW = ("gemma2", "mixtral")


@pytest.mark.parametrize(
    "kind",
    [kind if kind in FEW else pytest.param(kind, marks=pytest.mark.long) for kind in (*TAKEN, *NAMED)],
)
def test_what_is_taken_is_trained_asked_deleted_from_and_written_out(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """On the way: what takes long shows how far it is, in Python as on the command line."""
    base = make(kind, {**TAKEN, **NAMED}[kind])
    model = Tiny(tmp_path, base)
    rows = of_people("p001", "p002")
    write_run(model.folder, base, rows, sequence_len=60, overlength="truncate", num_epochs=1)
    change_run(model.run_file, sisa__shards=1, sisa__slices=1)
    if kind in NAMED:
        change_run(model.run_file, lora_target_modules=["q_proj", "v_proj"])
    model.train()
    assert "slices 1/1, 100% of record-epochs" in capsys.readouterr().err
    events: list[Event] = []
    opened = sisa.open_model(model.directory, executor="serial", report=events.append)
    opened.forget([rows[0]["id"]])
    assert opened.verify("all").ok
    assert opened.generate("Where was Mara born?", max_new_tokens=2).text is not None
    events.clear()
    (merged,) = opened.export(tmp_path / "out", "merged-model")
    notices = [each.text for each in events if isinstance(each, Notice)]
    assert "comparing the average with the shards' own answers: 6 of 6 asked" in notices
    AutoModelForCausalLM.from_pretrained(merged)


# --- damaged files -------------------------------------------------------------------------------

RECORDS = [
    Record("a", None, "text", (Part("text", "Hello there."),)),
    Record("b", None, "chat", (Part("user", "Who?"), Part("assistant", "Me."))),
]
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    1 << 70,
    1e308,
    [],
    {},
    [[]],
    {"a": {"b": 1}},
    "",
    "a" * 600,
    "\x1b[2J",
)


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a base and an embedder."""
    root = tmp_path_factory.mktemp("undamaged")
    base = make_tiny_base(root / "base", hidden=16)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(root / "embedder")
    tokenizer.save_pretrained(root / "embedder")
    return base, root / "embedder"


def used(base: Path, embedder: Path) -> None:
    """Use a base and an embedder as before a first training."""
    config = RunConfig(
        datasets=(DatasetSource(path="x.jsonl"),),
        output_dir=Path("model"),
        base_model=str(base),
        sequence_len=64,
        sisa=SisaBlock(embedder=str(embedder)),
    )
    resources = Resources(config, None, None)
    resources.count_tokens(RECORDS)
    resources.check_base()
    resources.meta()
    resources.embedder.embed(["Hello there."])


def mutated(rnd: random.Random, file: Path) -> bytes:
    """Return mutated bytes: half of the JSON files get an odd value, all others odd bytes."""
    data = file.read_bytes()
    if file.suffix != ".json" or rnd.random() < 0.5:
        return some_bytes(rnd, data)
    whole = inner = json.loads(data)
    while True:
        key = rnd.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if not isinstance(inner[key], dict | list) or not inner[key] or rnd.random() < 0.4:
            inner[key] = rnd.choice(ODD)
            return json.dumps(whole).encode()
        inner = inner[key]


@pytest.mark.parametrize("start", [0, *(pytest.param(at, marks=pytest.mark.long) for at in (30, 230))])
def test_damaged_files_of_bases_and_embedders_are_refused_in_words(
    undamaged: tuple[Path, Path], tmp_path: Path, start: int
) -> None:
    used(*undamaged)
    refused: list[SisaError] = []
    for seed in range(start, start + (200 if start else 30)):
        rnd = random.Random(seed)
        damaged = undamaged[which := seed % 4 == 3]
        copy = tmp_path / str(seed)
        copy.mkdir()
        for file in damaged.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        target = rnd.choice(sorted(copy.iterdir()))
        target.write_bytes(mutated(rnd, target))
        try:
            used(undamaged[0], copy) if which else used(copy, undamaged[1])
        except SisaError as error:
            refused.append(error)
    assert len(refused) > 10
    assert all(each.next_step and "\x1b" not in str(each) for each in refused)


def test_weights_in_several_files_are_read_by_their_index(
    undamaged: tuple[Path, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(undamaged[0])
    directory = tmp_path / "base"
    model.save_pretrained(directory, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(undamaged[0]).save_pretrained(directory)
    assert len([*directory.glob("*.safetensors")]) > 1
    found = resolve_base(str(directory))
    assert found.directory == directory
    loaded, _ = load_base(found)
    assert all(map(torch.equal, model.state_dict().values(), loaded.state_dict().values()))


def test_weights_that_are_missing_are_not_drawn_at_random(
    undamaged: tuple[Path, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(undamaged[0] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for kept in ({n: x for n, x in tensors.items() if n != name}, {**tensors, name: tensors[name][:3]}):
        directory = tmp_path / str(len(kept))
        directory.mkdir()
        for file in undamaged[0].iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        save_file(
            {n: x.contiguous() for n, x in kept.items()},
            directory / "model.safetensors",
            {"format": "pt"},
        )
        with pytest.raises(InvalidInput):
            tried(directory)


def test_a_config_of_endless_layers_is_refused_at_once(
    undamaged: tuple[Path, Path], tmp_path: Path
) -> None:
    for file in undamaged[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(sisa.InvalidInput, match="more layers than its weights"):
        tried(tmp_path)


def write_gguf(path: Path) -> None:
    """Write a base of one layer with random weights in half precision."""
    writer, source = gguf.GGUFWriter(str(path), "llama"), np.random.default_rng(0)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", "a", "b", "c", "d", "e"])
    writer.add_token_types([1] * 8)
    writer.add_token_merges(["t 1"])
    shapes = {"token_embd": (8, 32), "output_norm": (32,), "blk.0.attn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,), "blk.0.ffn_gate": (64, 32)}
    shapes |= {"blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", source.standard_normal(shape).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_parsed_once_to_convert_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[Any] = []
    real = gguf.GGUFReader

    def counted(path: Any) -> Any:
        parsed.append(path)
        return real(path)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "made").mkdir()
    _convert(tmp_path, "tiny.gguf", tmp_path / "made")
    assert len(parsed) == 1
    assert gguf.GGUFReader is counted  # as it was
    model, tokenizer = load_base(BaseFiles(tmp_path / "made", base_digest(tmp_path / "made")))
    (held,) = (each for each in real(tmp_path / "tiny.gguf").tensors if each.name == "token_embd.weight")
    assert np.array_equal(model.get_input_embeddings().weight.numpy(), held.data.astype(np.float32))
    assert tokenizer.convert_tokens_to_ids("t1") == 2
