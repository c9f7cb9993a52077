"""A trained LSTM in the wild: the cell of Silero VAD 6.2.3, which finds speech in sound (github.com/snakers4/silero-vad, MIT, (c) Silero Team).

tests/data/silero_lstm.safetensors holds, in half precision, the cell and its read-out out of the packaged TorchScript model, what its convolutions
made of the vowels below, and the probabilities of speech that it gave for them; `python tests/test_real_lstm.py` writes it anew from the package.
With the whole package (`regard data get silero_vad`) the slow test runs all of it. The package's safetensors file is of another training.
"""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import regard
from regard import RegardError
from regard.data import packages

FIXTURE = Path(__file__).parent / "data" / "silero_lstm.safetensors"
RATE, CHUNK, CONTEXT = 16000, 512, 64


def vowels(seconds: float = 2.4) -> Tensor:
    """A voice that sings five vowels between two silences: pulses of a gliding pitch through three resonances each, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    n, piece = int(seconds * RATE), RATE // 5
    t = torch.arange(n, dtype=torch.double) / RATE
    pitch = 120 + 25 * torch.sin(2 * math.pi * 1.3 * t) + 10 * torch.sin(2 * math.pi * 5 * t)
    pulses = torch.diff(torch.cumsum(pitch / RATE, 0).floor(), prepend=torch.zeros(1, dtype=torch.double))
    formants = ((730, 1090, 2440), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240), (530, 1840, 2480))
    k = torch.arange(800, dtype=torch.double) / RATE
    out = 0.003 * torch.randn(n, generator=generator, dtype=torch.double)
    for number in range(2, n // piece - 3):
        sound = pulses + 0.01 * torch.randn(n, generator=generator, dtype=torch.double)
        for frequency, width in zip(formants[number % 5], (80, 90, 120), strict=True):
            answer = torch.exp(-math.pi * width * k) * torch.sin(2 * math.pi * frequency * k)
            sound = F.conv1d(F.pad(sound[None, None], (799, 0)), answer.flip(0)[None, None])[0, 0]
        loud = torch.zeros(n, dtype=torch.double)
        loud[number * piece : (number + 1) * piece] = 0.5 / sound.abs().max()
        out += sound * F.avg_pool1d(loud[None, None], 801, 1, 400)[0, 0]
    return out.float()[: n // CHUNK * CHUNK]


def features(sound: Tensor, w: dict[str, Tensor]) -> Tensor:
    """What the LSTM gets: (1, chunks, 128)."""
    chunks = F.pad(sound, (CONTEXT, 0)).unfold(0, CHUNK + CONTEXT, CHUNK)
    x = F.conv1d(F.pad(chunks[:, None], (0, 64), "reflect"), w["stft.forward_basis_buffer"], stride=128)
    x = (x[:, :129].square() + x[:, 129:].square()).sqrt()
    for number, stride in enumerate((1, 2, 2, 1)):
        x = F.conv1d(x, *(w[f"encoder.{number}.reparam_conv.{kind}"] for kind in ("weight", "bias")), stride, 1).relu()
    return x[None, :, :, 0]


def speech(h: Tensor, w: dict[str, Tensor]) -> Tensor:
    return F.conv1d(h.relu().mT, w["decoder.decoder.2.weight"], w["decoder.decoder.2.bias"]).sigmoid()[0, 0]


def below(prefix: str, w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}


def outputs(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Those of our cell, found equal to those of torch's step by step."""
    ours = regard.load_official(regard.create("lstm_cell", 128, 128), state)
    theirs = nn.LSTMCell(128, 128)
    theirs.load_state_dict(state)
    with torch.no_grad():
        out, last = ours(x)
        again, _, gates = ours(x, return_gates=True)
        h, c = torch.zeros(1, 128), torch.zeros(1, 128)
        for t in range(x.shape[1]):
            h, c = theirs(x[:, t], (h, c))
            torch.testing.assert_close(out[:, t], h, rtol=0, atol=2e-6)
            torch.testing.assert_close(gates["c"][:, t], c, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last, (h, c), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again, out, rtol=0, atol=2e-6)
    return out


def test_the_cell_is_torchs_and_hears_what_the_package_hears() -> None:
    data = {name: t.float() for name, t in load_file(FIXTURE).items()}
    probabilities = data.pop("probabilities")
    heard = speech(outputs(below("decoder.rnn.", data), data["features"]), data)
    torch.testing.assert_close(heard, probabilities, rtol=0, atol=5e-3)
    assert probabilities[:5].max() < 0.3 and probabilities[12:57].min() > 0.5 and probabilities[-3:].max() < 0.3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_whole_package() -> None:
    try:
        folder = packages.fetched("silero_vad")
    except RegardError as error:
        pytest.skip(str(error))
    w, probabilities = packaged(folder)
    x = features(vowels(), w)
    torch.testing.assert_close(speech(outputs(below("decoder.rnn.", w), x), w), probabilities, rtol=0, atol=1e-5)
    outputs(below("lstm_cell.", load_file(folder / "silero_vad_16k.safetensors")), x)


def packaged(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The TorchScript model's weights and its probabilities of speech."""
    model = torch.jit.load(folder / "silero_vad.jit").eval()
    with torch.no_grad():
        return model._model.state_dict(), torch.cat([model(chunk[None], RATE)[0] for chunk in vowels().split(CHUNK)])


def write_fixture() -> None:
    folder = packages.fetch("silero_vad")
    w, probabilities = packaged(folder)
    kept = {name: t for name, t in w.items() if name.startswith("decoder.")}
    kept |= {"features": features(vowels(), w), "probabilities": probabilities}
    about = {"source": "silero-vad 6.2.3, silero_vad.jit, 16 kHz", "licence": (folder / "LICENSE").read_text()}
    temporary = FIXTURE.with_suffix(".tmp")
    save_file({name: t.detach().half().contiguous() for name, t in kept.items()}, temporary, about)
    temporary.chmod(0o644)
    os.replace(temporary, FIXTURE)


if __name__ == "__main__":
    write_fixture()
