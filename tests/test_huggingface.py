"""
Models in Hugging Face's format, in and out, against transformers; and the download of GPT-2, with a
made-up hub.
"""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from test_model import random_tokens, small_model

import checkpoint
from model import GPT, GPTConfig

# The four sizes with a sixth of the layers, and heads of 8 instead of 64: n_layer, n_head, n_embd
SIZES = {
    "gpt2": (2, 12, 96),
    "gpt2-medium": (4, 16, 128),
    "gpt2-large": (6, 20, 160),
    "gpt2-xl": (8, 25, 200),
}


def transformers_model(n_layer, n_head, n_embd):
    """A GPT-2 of transformers with large random weights."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=16,
                                     vocab_size=61, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """A small GPT-2 as transformers saves it."""
    transformers_model(2, 2, 16).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def change_tensors(folder, change):
    """Rewrites model.safetensors; `change` gets a dict of all tensors to modify."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@torch.no_grad()
def assert_same_logits(ours, theirs, vocab_size=61):
    idx = random_tokens(2, 16)
    expected = theirs(idx).logits
    logits = ours(idx)[0][..., :vocab_size]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# ---- in ----


@pytest.mark.parametrize("size", SIZES)
def test_logits_and_loss_agree_with_transformers(size, tmp_path):
    theirs = transformers_model(*SIZES[size])
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    assert_same_logits(ours, theirs)
    idx = random_tokens(2, 16)
    with torch.no_grad():
        expected = theirs(idx, labels=idx).loss
        loss = ours(idx[:, :-1], idx[:, 1:])[1]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("old, new, named", [
    ('"model_type": "gpt2"', '"model_type": "llama"', "model_type is 'llama'"),
    ("gelu_new", "relu", "activation_function is 'relu'"),
    ('"layer_norm_epsilon": 1e-05', '"layer_norm_epsilon": 1e-06', "layer_norm_epsilon is 1e-06"),
    ('"n_inner": null', '"n_inner": 32', "n_inner is not 4"),
    ('"n_layer": 2', '"n_layer": 3', "the weights do not fit.*transformer.h.2"),
    ('"n_layer": 2', '"n_layer": 1', "the weights do not fit.*transformer.h.1"),
    ('"vocab_size": 61', '"vocab_size": 60', "the weights do not fit.*wte.weight"),
    ('"n_embd": 16', '"n_embd": 17', "n_embd=17 is not divisible by n_head=2"),
    ("{", "", "cannot read a GPT-2 from .*JSONDecodeError"),
])
def test_another_architecture_is_refused(folder, old, new, named):
    config = (folder / "config.json").read_text()
    assert old in config
    (folder / "config.json").write_text(config.replace(old, new, 1))
    with pytest.raises(ValueError, match=named):
        GPT.from_pretrained(str(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_weights_that_are_not_floating_point_are_refused(folder, dtype):
    def change(tensors):
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].to(dtype)
    change_tensors(folder, change)
    with pytest.raises(ValueError, match="transformer.wpe.weight are not finite floating-point"):
        GPT.from_pretrained(str(folder))


def test_weights_that_are_not_finite_are_refused(folder):
    def change(tensors):
        tensors["transformer.h.1.ln_1.bias"][3] = float("nan")
    change_tensors(folder, change)
    with pytest.raises(ValueError, match="transformer.h.1.ln_1.bias are not finite"):
        GPT.from_pretrained(str(folder))


def test_weights_in_half_precision_become_float32(folder):
    expected = load_file(folder / "model.safetensors")["transformer.wpe.weight"].half().float()

    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.half()
    change_tensors(folder, change)
    state = GPT.from_pretrained(str(folder)).state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert torch.equal(state["transformer.wpe.weight"], expected)


def test_openais_own_names_and_masks_are_understood(folder):
    expected = GPT.from_pretrained(str(folder)).state_dict()

    def change(tensors):  # as in the files of the hub
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    change_tensors(folder, change)
    state = GPT.from_pretrained(str(folder)).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_other_files_of_weights_in_the_folder_are_not_read(folder):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    zeros = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        zeros[name] = torch.zeros_like(tensor)
    for name in ("model_old", "model-00001-of-00001", "adapter"):
        save_file(zeros, folder / f"{name}.safetensors")
    index = {"weight_map": dict.fromkeys(zeros, "model_old.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_logits(GPT.from_pretrained(str(folder)).eval(), theirs)


def test_shards_are_read_by_their_index(folder, tmp_path):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list(tmp_path.glob("shards/*.safetensors"))) > 2
    save_file({"transformer.extra": torch.zeros(1)}, tmp_path / "shards/model-00000.safetensors")
    assert_same_logits(GPT.from_pretrained(str(tmp_path / "shards")).eval(), theirs)
    next(tmp_path.glob("shards/model-00001-*")).unlink()
    with pytest.raises(ValueError, match="cannot read a GPT-2 .*model-00001"):
        GPT.from_pretrained(str(tmp_path / "shards"))


def test_override_args_may_set_dropout_only(folder):
    model = GPT.from_pretrained(str(folder), dict(dropout=0.25))
    assert model.config.dropout == 0.25
    for name in ("dropouts", "n_layer"):
        with pytest.raises(ValueError, match=f"override_args=.*{name}.* may only set 'dropout'"):
            GPT.from_pretrained(str(folder), {name: 1})


def test_unknown_model_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="no model 'gpt3'.*gpt2-medium.*a folder"):
        GPT.from_pretrained("gpt3")


def test_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read a GPT-2.*config.json"):
        GPT.from_pretrained(str(tmp_path))


# ---- out ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_transformers_loads_what_we_save(size, bias, tmp_path):
    n_layer, n_head, n_embd = SIZES[size]
    ours = small_model(n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=bias)
    ours.save_pretrained(str(tmp_path))
    assert_same_logits(ours, transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval())


def test_padding_of_the_vocabulary_is_not_saved(tmp_path):
    ours = small_model(vocab_size=50304, n_layer=1, n_embd=8)
    ours.save_pretrained(str(tmp_path))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert theirs.config.vocab_size == 50257
    assert theirs.config.eos_token_id == 50256
    assert_same_logits(ours, theirs, vocab_size=50257)


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write a model to .*file"):
        small_model().save_pretrained(str(tmp_path / "file"))


@pytest.fixture
def exported(run, tmp_path):
    """A model with a short context, exported by sample.py."""
    torch.manual_seed(0)
    GPT(GPTConfig(32, 50304, 2, 2, 16, bias=False)).save_pretrained(str(tmp_path / "model"))
    folder = tmp_path / "exported"
    with pytest.raises(SystemExit) as stopped:
        run("sample.py", f"--init_from={tmp_path / 'model'}", f"--export={folder}")
    assert not stopped.value.code
    assert f"vocab.json to {folder}" in run.out
    return folder


def test_exported_model_serves_a_pipeline(exported, run):
    pipeline = transformers.pipeline("text-generation", str(exported))
    prompt = "Once upon a time"
    expected = pipeline(prompt, max_new_tokens=20, do_sample=False)[0]["generated_text"]
    run("sample.py", f"--init_from={exported}", f"--start={prompt}", "--temperature=0",
        "--num_samples=1", "--max_new_tokens=20", "--device=cpu", "--dtype=float32")
    assert run.out.split("\n" + "-" * 15)[0] == expected


def test_pipeline_with_default_arguments_stays_in_a_short_context(exported):
    pipeline = transformers.pipeline("text-generation", str(exported))
    text = pipeline("Once upon a time")[0]["generated_text"]
    assert text.startswith("Once upon a time")
    assert 4 < len(pipeline.tokenizer(text)["input_ids"]) <= 40  # its tokens may join differently


def test_exported_tokenizer_is_gpt2s(exported):
    from data.common import gpt2_bpe
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    text = "It's <|endoftext|> zwölf 🙂\n\n  boxes"
    assert theirs(text)["input_ids"] == gpt2_bpe().encode(text, allowed_special="all")


# ---- the download ----


class HubError(Exception):
    """As huggingface_hub raises for a status of the server, from the HTTP library's own error."""

    def __init__(self, status, message="from the hub"):
        super().__init__(f"status {status} {message}")
        self.response = SimpleNamespace(status_code=status)
        if message == "from the hub":
            self.__cause__ = HubError(status, "from the HTTP library")


@pytest.fixture
def hub(monkeypatch):
    """
    Replaces hf_hub_download. Each download takes the next of hub.answers, an exception or a path;
    the last one stays. hub.cached is the path in the cache, if any.
    """
    hub = SimpleNamespace(cached=None, answers=[], requests=[], pauses=[])

    def hf_hub_download(repo, name, local_files_only=False):
        if local_files_only:
            if hub.cached is None:
                raise LocalEntryNotFoundError("not in the cache")
            return hub.cached
        hub.requests.append((repo, name))
        answer = hub.answers.pop(0) if len(hub.answers) > 1 else hub.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(checkpoint.time, "sleep", hub.pauses.append)
    return hub


def test_cached_file_needs_no_network(hub):
    hub.cached = "cached/config.json"
    assert checkpoint.find_file("gpt2", "config.json") == "cached/config.json"
    assert hub.requests == []


@pytest.mark.parametrize("error", [
    HubError(429), HubError(503), ConnectionResetError("reset by peer"),
])
def test_download_is_repeated_after_an_error_that_may_pass(hub, error):
    hub.answers = [error, "downloaded/config.json"]
    assert checkpoint.find_file("gpt2-xl", "config.json") == "downloaded/config.json"
    assert hub.requests == 2 * [("openai-community/gpt2-xl", "config.json")]
    assert len(hub.pauses) == 1


def test_error_that_stays_is_named(hub):
    hub.answers = [HubError(503)]
    with pytest.raises(ValueError, match="GPT-2 from 'gpt2': HubError: status 503 from the hub"):
        GPT.from_pretrained("gpt2")
    assert 2 <= len(hub.requests) <= 4


@pytest.mark.parametrize("status", [401, 403, 404])
def test_error_that_will_not_pass_is_named_at_once(hub, status):
    hub.answers = [HubError(status)]
    with pytest.raises(ValueError, match=f"'gpt2': HubError: status {status} from the hub"):
        GPT.from_pretrained("gpt2")
    assert hub.pauses == []


@pytest.mark.parametrize("cause", [
    OfflineModeIsEnabled("offline mode is enabled"), OSError("connection refused"),
])
def test_hub_that_cannot_be_reached_is_named_by_its_cause(hub, cause):
    error = LocalEntryNotFoundError("check your connection")
    error.__cause__ = cause
    hub.answers = [error]
    with pytest.raises(ValueError, match=f"{type(cause).__name__}: {cause}"):
        GPT.from_pretrained("gpt2")
    assert hub.pauses == []  # the library has tried it several times


def test_ctrl_c_ends_the_download(hub):
    hub.answers = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        GPT.from_pretrained("gpt2")
    assert len(hub.requests) == 1
