"""Augmentation on the device: pure functions of a key and a batch of images.

The same key and batch give the same result, on any mesh. Distributions are those of
timm, whose formulas the tests hold them to.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, Num, UInt8

TRIES = 10
"""Rectangles drawn for an image until one is inside it."""


@jax.jit
def flip(key: Key[Array, ""], image: Num[Array, "b h w c"]) -> Num[Array, "b h w c"]:
    """Half of the images, left to right."""
    turned = jax.random.bernoulli(key, 0.5, (len(image), 1, 1, 1))
    return jnp.where(turned, image[:, :, ::-1], image)


@functools.partial(jax.jit, static_argnames="pad")
def crop(
    key: Key[Array, ""], image: Num[Array, "b h w c"], *, pad: int = 4
) -> Num[Array, "b h w c"]:
    """Images moved by up to `pad` pixels either way, zeros where they were not."""
    wide = jnp.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corner = jax.random.randint(key, (len(image), 2), 0, 2 * pad + 1)

    def part(image: Array, corner: Array) -> Array:
        start = (corner[0], corner[1], 0)
        return jax.lax.dynamic_slice(image, start, shape)

    shape = image.shape[1:]
    return jax.vmap(part)(wide, corner)


@functools.partial(jax.jit, static_argnames=("area", "aspect"))
def resized_crop(
    key: Key[Array, ""],
    image: UInt8[Array, "b h w c"],
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> UInt8[Array, "b h w c"]:
    """A random rectangle of each image in the size of the whole.

    Its area is uniform in `area` of the image's, the logarithm of its aspect in that of
    `aspect`; where none of ten is inside, it is the middle of the image. Interpolation
    is bilinear or bicubic, as Pillow's, which lowers what is made smaller.
    """
    height, width = image.shape[1:3]
    shape_key, kind_key = jax.random.split(key)
    h, w, top, left, fits = _rectangles(
        shape_key, len(image), (height, width), area, aspect, inclusive=True
    )
    middle_h = min(height, round(width / aspect[0]))
    middle_w = min(width, round(height * aspect[1]))
    h, w = jnp.where(fits, h, middle_h), jnp.where(fits, w, middle_w)
    top = jnp.where(fits, top, (height - middle_h) // 2)
    left = jnp.where(fits, left, (width - middle_w) // 2)
    cubic = jax.random.bernoulli(kind_key, 0.5, (len(image),))
    return resize(image, top, left, h, w, cubic)


def resize(
    image: UInt8[Array, "b h w c"],
    top: Int[Array, " b"],
    left: Int[Array, " b"],
    h: Int[Array, " b"],
    w: Int[Array, " b"],
    cubic: Bool[Array, " b"],
) -> UInt8[Array, "b h w c"]:
    """Rectangles in the size of the whole images, interpolated in themselves alone."""
    rows = jax.vmap(functools.partial(_weights, image.shape[1]))(top, h, cubic)
    columns = jax.vmap(functools.partial(_weights, image.shape[2]))(left, w, cubic)
    pixels = image.astype(jnp.float32)
    pixels = _rounded(jnp.einsum("bjw,bhwc->bhjc", columns, pixels))
    return _rounded(jnp.einsum("bih,bhjc->bijc", rows, pixels)).astype(jnp.uint8)


def _rounded(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Whole numbers from 0 to 255, as Pillow has them after the columns too."""
    return jnp.clip(jnp.floor(x + 0.5), 0, 255)


def _weights(
    size: int, start: Int[Array, ""], length: Int[Array, ""], cubic: Bool[Array, ""]
) -> Float[Array, "size size"]:
    """Of `size` new pixels over the old ones in [start, start + length)."""
    scale = length / size
    old = jnp.arange(size)
    new = start + (jnp.arange(size) + 0.5) * scale
    x = jnp.abs(new[:, None] - (old + 0.5)[None]) / jnp.maximum(scale, 1.0)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    bicubic = jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))
    weight = jnp.where(cubic, bicubic, jnp.maximum(0.0, 1 - x))
    mine = (old >= start) & (old < start + length)
    weight = jnp.where(mine[None], weight, 0.0)
    return weight / jnp.sum(weight, axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("probability", "area", "least_aspect"))
def erase(
    key: Key[Array, ""],
    image: Float[Array, "b h w c"],
    *,
    probability: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    least_aspect: float = 0.3,
) -> Float[Array, "b h w c"]:
    """A random rectangle of some standardised images, as normal noise.

    Source:   Zhong et al. 2017, in timm's form "pixel".
    """
    choice, where, noise = jax.random.split(key, 3)
    size = (image.shape[1], image.shape[2])
    aspect = (least_aspect, 1 / least_aspect)
    h, w, top, left, fits = _rectangles(
        where, len(image), size, area, aspect, inclusive=False
    )
    chosen = fits & jax.random.bernoulli(choice, probability, (len(image),))
    inside = jax.vmap(functools.partial(_inside, size))(top, top + h, left, left + w)
    inside = inside & chosen[:, None, None]
    drawn = jax.random.normal(noise, image.shape, image.dtype)
    return jnp.where(inside[..., None], drawn, image)


def _rectangles(
    key: Array,
    count: int,
    size: tuple[int, int],
    area: tuple[float, float],
    aspect: tuple[float, float],
    *,
    inclusive: bool,
) -> tuple[Array, Array, Array, Array, Array]:
    """Height, width, top and left of the first that is inside, and whether one was.

    Aspect is width over height. Args: inclusive: whether as large as the image counts.
    """
    height, width = size
    keys = jax.random.split(key, 3)
    pixels = jax.random.uniform(
        keys[0], (count, TRIES), minval=area[0], maxval=area[1]
    ) * (height * width)
    ratio = jnp.exp(
        jax.random.uniform(
            keys[1],
            (count, TRIES),
            minval=math.log(aspect[0]),
            maxval=math.log(aspect[1]),
        )
    )
    w = jnp.round(jnp.sqrt(pixels * ratio)).astype(jnp.int32)
    h = jnp.round(jnp.sqrt(pixels / ratio)).astype(jnp.int32)
    room = 0 if inclusive else 1
    fits = (h > 0) & (w > 0) & (h <= height - room) & (w <= width - room)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    h, w = (jnp.take_along_axis(x, first, axis=1)[:, 0] for x in (h, w))
    place = jax.random.uniform(keys[2], (2, count))
    top = jnp.floor(place[0] * (height - h + 1)).astype(jnp.int32)
    left = jnp.floor(place[1] * (width - w + 1)).astype(jnp.int32)
    return h, w, top, left, jnp.any(fits, axis=1)


def _inside(
    size: tuple[int, int], top: Array, bottom: Array, left: Array, right: Array
) -> Bool[Array, "h w"]:
    row, column = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None]
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


def targets(
    label: Int[Array, " b"], classes: int, smoothing: float = 0.0
) -> Float[Array, "b classes"]:
    """Labels as probabilities, a part `smoothing` spread over all classes."""
    return optax.smooth_labels(jax.nn.one_hot(label, classes), smoothing)


@jax.jit
def mixup(
    key: Key[Array, ""],
    image: Float[Array, "b h w c"],
    target: Float[Array, "b classes"],
    alpha: float = 0.1,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """λ of each image and target, 1 - λ of its partner: the batch turned around.

    One λ from Beta(alpha, alpha) for the batch.

    Source:   Zhang et al. 2018, in timm's form "batch".
    """
    share = jax.random.beta(key, alpha, alpha)
    return _blend(image, share), _blend(target, share)


@jax.jit
def cutmix(
    key: Key[Array, ""],
    image: Float[Array, "b h w c"],
    target: Float[Array, "b classes"],
    alpha: float = 1.0,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """A box of each image from its partner, and as large a part of its target.

    One box for the batch, (1 - λ)^(1/2) of each side, λ from Beta(alpha, alpha); what
    of it is outside the image does not count.

    Source:   Yun et al. 2019, in timm's form "batch".
    """
    height, width = image.shape[1:3]
    share_key, place = jax.random.split(key)
    share = jax.random.beta(share_key, alpha, alpha)
    middle = jax.random.randint(place, (2,), 0, jnp.array([height, width]))
    box = bounds((height, width), share, middle[0], middle[1])
    inside = _inside((height, width), *box)
    share = 1 - jnp.mean(inside)
    mixed = jnp.where(inside[..., None], image[::-1], image)
    return mixed, _blend(target, share)


def bounds(
    size: tuple[int, int], share: Float[Array, ""], row: Array, column: Array
) -> tuple[Array, Array, Array, Array]:
    """Top, bottom, left and right of a box around a pixel, cut at the image."""
    found = []
    for length, middle in zip(size, (row, column), strict=True):
        cut = jnp.floor(length * jnp.sqrt(1 - share)).astype(jnp.int32)
        found += [
            jnp.clip(middle - cut // 2, 0, length),
            jnp.clip(middle + (cut + 1) // 2, 0, length),
        ]
    return found[0], found[1], found[2], found[3]


@jax.jit
def mix(
    key: Key[Array, ""],
    image: Float[Array, "b h w c"],
    target: Float[Array, "b classes"],
    mixup_alpha: float = 0.1,
    cutmix_alpha: float = 1.0,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """The batch after `mixup` or `cutmix`, one as often as the other."""
    choice, inner = jax.random.split(key)
    return jax.lax.cond(
        jax.random.bernoulli(choice),
        lambda: cutmix(inner, image, target, cutmix_alpha),
        lambda: mixup(inner, image, target, mixup_alpha),
    )


def _blend(x: Float[Array, "b ..."], share: Float[Array, ""]) -> Float[Array, "b ..."]:
    share = share.astype(x.dtype)
    return share * x + (1 - share) * x[::-1]
