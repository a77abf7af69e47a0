"""Two tiny artifacts: a model that answers about pictures, and a classifier of three modalities."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from fusion_jax.data.audio import Waveforms
from fusion_jax.data.image import Pictures
from fusion_jax.data.text import ByteTokenizer, Ids
from fusion_jax.deployment import stablehlo
from fusion_jax.deployment.predictor import Predictor
from fusion_jax.encoders.projection import Project
from fusion_jax.encoders.text import TextTransformer
from fusion_jax.encoders.vit import ViT
from fusion_jax.fusion.gated import Gated
from fusion_jax.fusion.multimodal import Multimodal
from fusion_jax.language.ask import Assistant, Encoder
from fusion_jax.language.chat import Chat
from fusion_jax.language.connectors import Projection
from fusion_jax.language.fused import FusedLM, init_around
from fusion_jax.language.prompt import pad
from fusion_jax.tokens import Tokens

spec = importlib.util.spec_from_file_location(
    "tiny", Path(__file__).parents[1] / "language" / "tiny.py"
)
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
tiny.LAYERS = 1  # less to compile

TEMPLATE = "{% for m in messages %}w3 {{ m.content }} {% endfor %}w4"
SIDE = 8


def look(params, pictures):
    """Four tokens of a picture, and how likely each of three words is."""
    rows = pictures.values.reshape(pictures.values.shape[0], 4, -1)
    tokens = jnp.einsum("btd,de->bte", rows, params["kernel"])
    scores = tokens.sum(axis=1)[:, :3]
    mask = jnp.broadcast_to(pictures.mask[:, None], tokens.shape[:2])
    return Tokens(tokens, mask), scores


@pytest.fixture(scope="session")
def assistant():
    """Its readers take what `look` takes, so that in-process answers are the reference."""
    words = {f"w{i}": i for i in range(tiny.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["w2"])
    decoder = tiny.decoder()
    model = FusedLM(decoder, {"image": Projection(tiny.WIDTH)})
    media = {"image": Tokens(np.zeros((1, 1, 4, 5), np.float32), np.ones((1, 1, 4), bool))}
    base = {"decoder": tiny.random_params(decoder)}
    params = init_around(model, jax.random.key(0), {"text": pad([[1, 2]])} | media, base)
    kernel = np.random.default_rng(0).normal(size=(SIDE * SIDE * 3 // 4, 5)).astype(np.float32)
    encoder = Encoder(look, {"kernel": kernel}, Pictures(SIDE), ("w7", "w8", "w9"), 2)

    def seen(file):
        pixels = Pictures(SIDE)({"image": file.read_bytes()}, None)[None]
        return look({"kernel": kernel}, Tokens(pixels, np.ones(1, bool)))

    def read(file):
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:, None], seen(file)[0])

    def words_of(file):
        best = np.argsort(-np.asarray(seen(file)[1][0]))[:2]
        return ", ".join(("w7", "w8", "w9")[i] for i in best) + ".\n"

    return Assistant(
        model,
        params,
        Chat(tokenizer, TEMPLATE, {}, (2,)),
        model.layout(jax.random.key(0), media),
        readers={"image": read},
        words={"image": words_of},
        encoders={"image": encoder},
        data="random numbers",
        languages=("en", "fr", "xx"),
    )


@pytest.fixture(scope="session")
def classifier():
    encoders = {
        "image": ViT(16, patch=4, grid=(2, 2), layers=1, heads=2),
        "audio": Project(16),
        "text": TextTransformer(ByteTokenizer().vocabulary, 16, layers=1, heads=2),
    }
    model = Multimodal(encoders, Gated(), classes=3)

    def framed(raw):
        """Sound in frames of 64 samples; what is left over at the end is not heard."""
        audio = raw["audio"]
        count = audio.values.shape[1] // 64
        values = audio.values[:, : count * 64].reshape(-1, count, 64)
        return raw | {"audio": Tokens(values, audio.mask[:, 63::64])}

    def apply(params, raw):
        outputs = model.apply({"params": params}, framed(raw))
        return {"logits": outputs.logits} | {
            f"{name}_embedding": vector for name, vector in outputs.embeddings.items()
        }

    transforms = {
        "image": Pictures(SIDE),
        "audio": Waveforms(0.25),
        "text": Ids(ByteTokenizer(), 24),
    }
    example = {
        "image": Tokens(np.zeros((1, SIDE, SIDE, 3), np.float32), np.ones(1, bool)),
        "audio": Tokens(np.zeros((1, 1024), np.float32), np.ones((1, 1024), bool)),
        "text": Tokens(np.ones((1, 4), np.int32), np.ones((1, 4), bool)),
    }
    params = model.init(jax.random.key(0), framed(example))["params"]
    return Predictor(apply, params, transforms, ("cat", "dog", "emu"), "random numbers")


@pytest.fixture(scope="session")
def talker(assistant, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts") / "talker"
    stablehlo.write(folder, "talker", assistant, {})
    return folder


@pytest.fixture(scope="session")
def predicts(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts") / "predicts"
    stablehlo.write(folder, "predicts", classifier, {"metrics": {"accuracy": 0.5}})
    return folder
