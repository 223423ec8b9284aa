"""Models in Hugging Face's format, in and out, against transformers."""

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import random_tokens, small_model

from model import GPT

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


@torch.no_grad()
def assert_same_logits(ours, theirs):
    idx = random_tokens(2, 16)
    logits = ours(idx)[0][..., :theirs.config.vocab_size]
    torch.testing.assert_close(logits, theirs(idx).logits, rtol=1e-4, atol=1e-4)


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
    ('"n_inner": null', '"n_inner": 32', "n_inner is 32"),
    ('"n_layer": 2', '"n_layer": 3', "(?s)the weights do not fit.*transformer.h.2"),
    ('"n_embd": 16', '"n_embd": 17', "n_embd=17 must be a multiple of n_head=2"),
    ("{", "", "cannot read a GPT-2 from .*JSONDecodeError"),
])
def test_another_architecture_is_refused(folder, old, new, named):
    config = (folder / "config.json").read_text()
    assert old in config
    (folder / "config.json").write_text(config.replace(old, new, 1))
    with pytest.raises(ValueError, match=named):
        GPT.from_pretrained(str(folder))


def test_openais_own_files_are_downloaded_and_understood(folder, monkeypatch):
    """They have shorter names, and masks."""
    def download(repository, allow_patterns):
        assert repository == "openai-community/gpt2"
        return str(folder)

    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    tensors = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril()}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name.removeprefix("transformer.")] = tensor
    (folder / "model.safetensors").unlink()  # `theirs` may have mapped it
    save_file(tensors, folder / "model.safetensors")
    assert_same_logits(GPT.from_pretrained("gpt2").eval(), theirs)


def test_a_model_in_several_files_is_read(folder):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    theirs.save_pretrained(folder / "shards", max_shard_size="10KB")
    assert len(list(folder.glob("shards/*.safetensors"))) > 2
    (folder / "shards/model_old.safetensors").touch()  # not one of them
    assert_same_logits(GPT.from_pretrained(str(folder / "shards")).eval(), theirs)


def test_unusable_sources_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="no model 'gpt3'.*gpt2-medium.*a folder"):
        GPT.from_pretrained("gpt3")
    with pytest.raises(ValueError, match="cannot read a GPT-2.*config.json"):
        GPT.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="cannot read a GPT-2 from 'gpt2': .*cached"):
        GPT.from_pretrained("gpt2")  # the tests are offline
    assert GPT.from_pretrained(str(folder), dict(dropout=0.25)).config.dropout == 0.25


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_transformers_loads_what_we_save(size, bias, tmp_path):
    """But not the padding of the vocabulary."""
    n_layer, n_head, n_embd = SIZES[size]
    vocab_size = 50304 if size == "gpt2" else 61
    ours = small_model(n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=bias,
                       vocab_size=vocab_size)
    ours.save_pretrained(str(tmp_path))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert theirs.config.vocab_size == min(vocab_size, 50257)
    assert theirs.config.eos_token_id == (50256 if size == "gpt2" else None)
    assert_same_logits(ours, theirs)


def test_a_model_that_is_no_gpt2_any_more_is_not_exported(tmp_path):
    untied, wider, longer = small_model(), small_model(), small_model()
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight + 1)
    wider.transformer.h[0].mlp.c_fc = torch.nn.Linear(32, 160)
    longer.transformer.extra = torch.nn.Linear(2, 2)
    biased = small_model()
    biased.lm_head.bias = torch.nn.Parameter(torch.ones(61))
    for model, named in ((untied, "lm_head, which is not tied"), (wider, "h.0.mlp.c_fc"),
                         (biased, "lm_head.bias"), (longer, "transformer.extra")):
        with pytest.raises(ValueError, match=f"only a GPT-2 can be exported; .*{named}"):
            model.save_pretrained(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        small_model().save_pretrained(str(tmp_path / "file"))
