"""Codes images with a VAE and decodes them bit for bit: log p(x) is the size of the file.

pip install constriction
python examples/studies/file_size.py                       # bundled digits, a minute
python examples/studies/file_size.py --run RUN --root data # 1000 digits of MNIST under a run
python examples/studies/file_size.py --smoke

Given a z, an image x takes -log2 p(x | z) bits, and z itself takes -log2 p(z) bits. The choice of
z is free, so bits that are already in the file choose it: decoding z ~ q(z | x) from the file
removes -log2 q(z | x) bits. Reading the image puts them back. So an image adds
-log2 p(x | z) p(z) / q(z | x) bits, on average the negative ELBO. If an estimate of log p(x) is
too high, no file can be as small as it says.

Townsend, Bird and Barber. Practical lossless compression with latent variables using bits back
coding. 2019.
"""

from __future__ import annotations

import argparse
import bz2
import io
import math

import constriction
import numpy as np
import torch
from matplotlib import image
from torch import Tensor

from pyro_vae import VAE, build, fit, load, log_evidence
from pyro_vae.data import load_data

stream = constriction.stream
STEP = 2**-8  # between neighbouring values of a latent
LARGEST = 2**12  # steps on either side of zero


class Coder:
    """A file of images, coded by a VAE with a standard Normal prior and Bernoulli likelihood."""

    def __init__(self, vae: VAE, words: int = 200) -> None:
        self.vae = vae
        self.latent = stream.model.QuantizedGaussian(-LARGEST, LARGEST)
        self.pixel = stream.model.Bernoulli(perfect=False)
        seed = np.random.default_rng(0).integers(1, 2**32, words, dtype=np.uint32)
        self.file = stream.stack.AnsCoder(seed)  # random bits, from which the first z is decoded
        self.start = self.file.num_valid_bits()

    @property
    def bits(self) -> int:
        """The bits that the images have added."""
        return self.file.num_valid_bits() - self.start

    def write(self, x: Tensor) -> None:
        """Adds an image [*E] of zeros and ones."""
        steps = self.file.decode(self.latent, *self._posterior(x))
        pixels = x.flatten().numpy().astype(np.int32)
        self.file.encode_reverse(pixels, self.pixel, self._pixels(steps))
        self.file.encode_reverse(steps, self.latent, *self._prior(steps))

    def read(self) -> Tensor:
        """Returns the last image and removes it, so the file is as before it was added."""
        count = self.vae.posterior.latent_dim
        steps = self.file.decode(self.latent, *self._prior(np.zeros(count)))
        pixels = self.file.decode(self.pixel, self._pixels(steps))
        x = torch.from_numpy(pixels).float().view(self.vae.likelihood.data_shape)
        self.file.encode_reverse(steps, self.latent, *self._posterior(x))
        return x

    def _prior(self, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(len(steps)), np.full(len(steps), 1 / STEP)

    @torch.no_grad()
    def _posterior(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        q = self.vae.encode(x.unsqueeze(0))
        loc, scale = (v[0].double().numpy() / STEP for v in (q.mean, q.stddev))
        return loc.clip(-LARGEST + 1, LARGEST - 1), scale

    @torch.no_grad()
    def _pixels(self, steps: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(steps * STEP).float().unsqueeze(0)
        p = self.vae.likelihood(z).mean[0].flatten().double().numpy()
        return p.clip(1e-6, 1 - 1e-6)


def others(x: Tensor) -> dict[str, float]:
    """Returns the bits that general programs need for all images."""
    packed = np.packbits(x.numpy().astype(np.uint8))
    png = io.BytesIO()
    image.imsave(png, x.squeeze(1).flatten(0, 1).numpy(), cmap="gray", format="png")
    return {"bz2": 8 * len(bz2.compress(packed.tobytes(), 9)), "PNG": 8 * len(png.getvalue())}


def main() -> dict[str, float]:
    """Codes and decodes the images; prints and returns the bits per image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", help="a run of thresholded MNIST; without one digits are learned")
    parser.add_argument("--root", default="data")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true", help="ten epochs, 11 images")
    options = parser.parse_args()
    data = load_data(
        "MNIST" if options.run else "digits", root=options.root, transform="threshold"
    )
    if options.run:
        vae = load(options.run)
    else:
        torch.manual_seed(0)
        vae = build((1, 8, 8), latent_dim=8)
        fit(vae, data.train, epochs=10 if options.smoke else 200, lr=2e-3, progress=False)
    count = min(11 if options.smoke else options.images, len(data.test))
    x, _ = data.test.fixed().batch(torch.arange(count))
    coder = Coder(vae.eval())
    for row in x:
        coder.write(row)
    bits = {"the file, by bits back": coder.bits}
    evidence = log_evidence(vae, x)
    bits["-log2 p(x)"] = -evidence.log_prob.sum().item() / math.log(2)
    bits |= others(x)
    exact = all(torch.equal(coder.read(), row) for row in x.flip(0))
    bits = {name: value / count for name, value in bits.items()}
    print(f"{count} images of {x[0].numel()} pixels, decoded bit for bit: {exact}; {evidence}")
    for name, value in bits.items():
        print(f"{name}: {value:.1f} bits per image")
    return {**bits, "exact": float(exact), "left": float(coder.bits)}


if __name__ == "__main__":
    main()
