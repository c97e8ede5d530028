"""Compression of the sentence encoder: a tiny one end to end, and its parts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from train import compress as program
from train.data import passages
from train.models.sentence_encoder import SentenceEncoder, from_bert

TINY = SentenceEncoder(words=50, places=32, depth=2, heads=2, width=16, hidden=32)


def tiny():
    tokens, mask = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    return TINY.init(jax.random.key(0), tokens, mask)["params"]


def drawn(count, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 50, rng.integers(3, 30)).tolist() for _ in range(count)]


def test_a_tiny_encoder_is_compressed_in_every_way(tmp_path):
    tokens = program.Tokens(drawn(40, 0), drawn(40, 1), drawn(200, 2))
    folder = tmp_path / "export"
    settings = program.Settings(keep=0.5, steps=20, batch=16, export=folder)
    found = program.compressed(TINY, tiny(), tokens, settings)
    assert found["keep"] == 0.5
    assert found["settings"].keys().isdisjoint({"data_dir", "out"})
    assert found["settings"]["keep"] == "0.5"
    assert found["block_weights"] == 2 * (4 * 16 * 16 + 2 * 16 * 32)
    assert found["kept"] <= 0.5 * found["block_weights"]
    assert found["plain"]["cosine"] < found["curvature"]["cosine"]
    assert found["curvature"]["cosine"] < found["tuned"]["cosine"] <= 1
    for name in ("plain", "activations", "curvature", "tuned"):
        assert 0 <= found[name]["neighbours"] <= 1
    assert set(found["ranks"]) == {
        f"block{i}/{x}/kernel"
        for i in range(2)
        for x in ("query", "key", "value", "attention_out", "mlp_in", "mlp_out")
    }
    json.dumps(found)
    # and what was written is what was measured
    written = oialr.load(folder)
    held = tokens.held_out
    mask = np.arange(32)[None] < np.array([[len(x)] for x in held])
    padded = np.zeros(mask.shape, np.int32)
    padded[mask] = np.concatenate(held)
    apply = jax.jit(lambda p, *x: TINY.apply({"params": p}, *x)[0])
    original = np.asarray(apply(tiny(), padded, mask))
    again = program.compared(np.asarray(written(padded, mask)), original)
    assert again["cosine"] == pytest.approx(found["tuned"]["cosine"], abs=1e-5)
    size = sum(x.stat().st_size for x in folder.iterdir() if x.suffix != ".json")
    assert found["export_mb"] == pytest.approx(size / 1e6)
    other = dataclasses.replace(settings, out=tmp_path / "again")
    with pytest.raises(FileExistsError, match="name another --export"):
        program.run(other)
    assert not other.out.exists()


def test_padding_changes_no_vector():
    params = tiny()
    tokens = jnp.array([[5, 6, 7, 0, 0], [5, 6, 7, 9, 3]])
    mask = jnp.arange(5)[None] < jnp.array([[3], [3]])
    padded, _ = TINY.apply({"params": params}, tokens, mask)
    alone, _ = TINY.apply({"params": params}, tokens[:1, :3], mask[:1, :3])
    np.testing.assert_allclose(padded, jnp.repeat(alone, 2, axis=0), atol=1e-5)


def test_params_are_read_by_the_names_of_bert():
    params = tiny()
    tensors = {
        "embeddings.word_embeddings.weight": params["words"]["embedding"],
        "embeddings.position_embeddings.weight": params["places"],
        "embeddings.token_type_embeddings.weight": np.repeat(params["kind"][0], 2, 0),
        "embeddings.LayerNorm.weight": params["norm"]["scale"],
        "embeddings.LayerNorm.bias": params["norm"]["bias"],
    }
    theirs = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_out": "attention.output.dense",
        "mlp_in": "intermediate.dense",
        "mlp_out": "output.dense",
        "norm1": "attention.output.LayerNorm",
        "norm2": "output.LayerNorm",
    }
    for i in range(2):
        for ours, name in theirs.items():
            layer = params[f"block{i}"][ours]
            weight = layer["kernel"].T if "kernel" in layer else layer["scale"]
            tensors[f"encoder.layer.{i}.{name}.weight"] = weight
            tensors[f"encoder.layer.{i}.{name}.bias"] = layer["bias"]
    found = from_bert({name: np.asarray(x) for name, x in tensors.items()})
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_passage_is_in_one_batch():
    tokens = drawn(75, 0)
    seen = []
    for batch in passages.batches(tokens, 8, np.random.default_rng(0).permutation(75)):
        assert batch.tokens.shape[0] == 8
        assert batch.tokens.shape[1] % passages.STEP == 0
        for row, mask, i in zip(*batch, strict=True):
            if i >= 0:
                assert row[mask].tolist() == tokens[i]
                seen.append(int(i))
    assert sorted(seen) == list(range(75))


def test_passages_to_measure_on_are_in_no_other_part():
    text = "\n\n".join(f"{i:03} " + "to be or not to be " * 4 for i in range(60))
    last, calibration, train = passages.split(text, held_out=20, calibration=30, seed=0)
    assert (len(last), len(calibration), len(train)) == (20, 30, 40)
    assert set(calibration) <= set(train)
    assert not set(last) & set(train)
    with pytest.raises(ValueError, match="has 60 passages: fewer than --held-out 50"):
        passages.split(text, held_out=50, calibration=30, seed=0)


def test_nearest_passages_are_counted():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(100, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    same = program.compared(vectors, vectors)
    assert same == {"cosine": pytest.approx(1), "neighbours": 1}
    other = program.compared(rng.permutation(vectors), vectors)
    assert other["neighbours"] < 0.3


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["minilm", "--keep", "1.5"], r"`keep` must be in \(0, 1\), got 1.5"),
        (["minlm"], "unknown model 'minlm', did you mean 'minilm'"),
        (["minilm", "--model", "nowhere"], "nowhere has no model.safetensors"),
    ],
    ids=["keep", "name", "folder"],
)
def test_what_cannot_be_done_is_one_line(arguments, error, capsys):
    with pytest.raises(SystemExit, match=error):
        program.main(arguments)


def test_a_text_that_is_missing_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.data\.prepare"):
        passages.text(tmp_path)
    (tmp_path / "input.txt").write_text("to be")
    assert passages.text(tmp_path) == "to be"


def test_the_packaged_encoder_gives_the_vectors_of_its_authors():
    """Cosines of the example in the documentation of Sentence Transformers."""
    for name in ("safetensors", "tokenizers", program.PACKAGE):
        pytest.importorskip(name)
    model, params, tokenizer = program.load(program.folder(None))
    texts = [
        "The weather is lovely today.",
        "It's so sunny outside!",
        "He drove to the stadium.",
    ]
    tokens = [x.ids for x in tokenizer.encode_batch(texts)]

    @oialr.factored
    def encode(params, tokens, mask):
        return model.apply({"params": params}, tokens, mask)

    vectors = program.embedded(jax.jit(encode), params, tokens)
    wanted = [[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]]
    np.testing.assert_allclose(vectors @ vectors.T, wanted, atol=1e-4)


def test_a_summary_that_is_there_stays(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"^error: .* has a summary.json: name anoth"):
        program.main(["minilm", "--out", str(tmp_path)])
    assert (tmp_path / "summary.json").read_text() == "{}"
