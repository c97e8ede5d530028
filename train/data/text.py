"""Text as numbers of characters: vocabulary, parts, windows; and some to test with."""

import dataclasses
from collections.abc import Mapping
from typing import TypedDict

import grain
import numpy as np
from jaxtyping import Int

from train.data.arrays import ordered

SONNETS = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade
Nor lose possession of that fair thou owest;
Nor shall Death brag thou wander'st in his shade,
When in eternal lines to time thou growest:
So long as men can breathe or eyes can see,
So long lives this, and this gives life to thee.

When, in disgrace with fortune and men's eyes,
I all alone beweep my outcast state
And trouble deaf heaven with my bootless cries
And look upon myself and curse my fate,
Wishing me like to one more rich in hope,
Featured like him, like him with friends possess'd,
Desiring this man's art and that man's scope,
With what I most enjoy contented least;
Yet in these thoughts myself almost despising,
Haply I think on thee, and then my state,
Like to the lark at break of day arising
From sullen earth, sings hymns at heaven's gate;
For thy sweet love remember'd such wealth brings
That then I scorn to change my state with kings.

Not marble, nor the gilded monuments
Of princes, shall outlive this powerful rhyme;
But you shall shine more bright in these contents
Than unswept stone besmear'd with sluttish time.
When wasteful war shall statues overturn,
And broils root out the work of masonry,
Nor Mars his sword nor war's quick fire shall burn
The living record of your memory.
'Gainst death and all-oblivious enmity
Shall you pace forth; your praise shall still find room
Even in the eyes of all posterity
That wear this world out to the ending doom.
So, till the judgment that yourself arise,
You live in this, and dwell in lovers' eyes.

Like as the waves make towards the pebbled shore,
So do our minutes hasten to their end;
Each changing place with that which goes before,
In sequent toil all forwards do contend.
Nativity, once in the main of light,
Crawls to maturity, wherewith being crown'd,
Crooked eclipses 'gainst his glory fight,
And Time that gave doth now his gift confound.
Time doth transfix the flourish set on youth
And delves the parallels in beauty's brow,
Feeds on the rarities of nature's truth,
And nothing stands but for his scythe to mow:
And yet to times in hope my verse shall stand,
Praising thy worth, despite his cruel hand.

That time of year thou mayst in me behold
When yellow leaves, or none, or few, do hang
Upon those boughs which shake against the cold,
Bare ruin'd choirs, where late the sweet birds sang.
In me thou seest the twilight of such day
As after sunset fadeth in the west,
Which by and by black night doth take away,
Death's second self, that seals up all in rest.
In me thou see'st the glowing of such fire
That on the ashes of his youth doth lie,
As the death-bed whereon it must expire
Consumed with that which it was nourish'd by.
This thou perceivest, which makes thy love more strong,
To love that well which thou must leave ere long.

Let me not to the marriage of true minds
Admit impediments. Love is not love
Which alters when it alteration finds,
Or bends with the remover to remove:
O no! it is an ever-fixed mark
That looks on tempests and is never shaken;
It is the star to every wandering bark,
Whose worth's unknown, although his height be taken.
Love's not Time's fool, though rosy lips and cheeks
Within his bending sickle's compass come:
Love alters not with his brief hours and weeks,
But bears it out even to the edge of doom.
If this be error and upon me proved,
I never writ, nor no man ever loved.
"""
"""Six of Shakespeare's sonnets: 18, 29, 55, 60, 73 and 116."""


class Passages(TypedDict):
    """Some passages, on the host: characters, and those that follow each."""

    token: Int[np.ndarray, "b t"]
    target: Int[np.ndarray, "b t"]


@dataclasses.dataclass(frozen=True)
class Text:
    """Parts of a text as places of its characters in the sorted `characters`."""

    parts: Mapping[str, Int[np.ndarray, " n"]]
    characters: str

    def decode(self, token: Int[np.ndarray, " n"]) -> str:
        """The characters at these places."""
        return "".join(self.characters[i] for i in token)


def encode(parts: Mapping[str, str]) -> Text:
    """Numbered characters of all parts.

    >>> encode({"train": "abba", "test": "c"}).parts["train"].tolist()
    [0, 1, 1, 0]
    """
    characters = sorted(set("".join(parts.values())))
    number = {x: i for i, x in enumerate(characters)}
    found = {
        name: np.array([number[x] for x in text], np.int32)
        for name, text in parts.items()
    }
    return Text(found, "".join(characters))


def embedded() -> Text:
    """The sonnets: four fifths to train on, a tenth to validate on and to test on."""
    first, second = int(0.8 * len(SONNETS)), int(0.9 * len(SONNETS))
    return encode(
        {
            "train": SONNETS[:first],
            "validation": SONNETS[first:second],
            "test": SONNETS[second:],
        }
    )


def batches(
    token: Int[np.ndarray, " n"],
    *,
    context: int,
    batch: int,
    seed: int,
    part: slice = slice(None),
) -> grain.MapDataset[Passages]:
    """A sequence without end whose item t is the batch of step t, or `part` of it.

    Passages begin at every place of the text, in a new order every epoch.

    Raises:   ValueError: the text is not longer than `context`.
    """
    _check(token, context)
    order = ordered(len(token) - context, batch=batch, seed=seed)
    return order.map(lambda index: _take(token, index[part], context))


def passages(token: Int[np.ndarray, " n"], *, context: int) -> Passages:
    """All of the text once, end to end, to evaluate on; less than `context` is lost.

    Raises:   ValueError: the text is not longer than `context`.
    """
    _check(token, context)
    return _take(token, np.arange(0, len(token) - context, context), context)


def _check(token: Int[np.ndarray, " n"], context: int) -> None:
    if not 0 < context < len(token):
        raise ValueError(f"`context` must be in [1, {len(token) - 1}], got {context}")


def _take(
    token: Int[np.ndarray, " n"], start: Int[np.ndarray, " b"], context: int
) -> Passages:
    row = token[start[:, None] + np.arange(context + 1)]
    return {"token": row[:, :-1], "target": row[:, 1:]}
