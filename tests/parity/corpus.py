"""Texts for comparing logits: written for this purpose and fixed, so that figures of two days compare.

The licence and the texts that are hard to tokenize are in the repository anyway. Prose that a model knows by heart gives
sharp distributions, text that it was never trained on gives flat ones with near ties; there is some of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests import oracle

ENGLISH = """\
The lighthouse at the end of the pier had not been lit for eleven years when Marta came back to the island. She had
expected to find the door locked, or the stairs rotten, or at least a family of gulls in the lamp room; instead somebody
had swept the floor and put a chair by the window. On the chair lay a notebook. The first page said, in a careful hand,
that the tide tables printed in the capital were wrong by nine minutes, and every page after it gave the proof.

She read until the light failed. The writer had measured the water twice a day with a painted stick, had noted the wind
and the pressure, and had never once drawn a conclusion that the numbers did not carry. Where a storm had broken the
stick there was a gap of four days, an apology, and a drawing of the new one. Nobody in the village could tell her who it
was. The baker thought of the schoolteacher, who had died; the schoolteacher's widow thought of the baker's brother, who
could not write. So Marta did what seemed natural: she sharpened a pencil, went down to the water at a quarter past six,
and added a line.

Why does the sea rise twice a day and not once? The moon pulls the near side of the ocean more strongly than the centre
of the earth, and the centre more strongly than the far side. What is left over stretches the water in both directions,
so there are two bulges, and the turning earth carries every harbour through both of them. The delay between the moon's
passage and high water depends on the shape of the coast, which is why tables must be measured and cannot be computed
from the sky alone.
"""
CHINESE = """\
清晨六点，河边的菜市场已经热闹起来。卖豆腐的老王把木板一块一块地摆好，又用湿布擦了两遍，才肯开张。他说，豆腐和人一样，最怕的是
急。水要慢慢烧，豆子要泡一整夜，点卤的时候手不能抖。旁边卖鱼的年轻人听了直笑：“王叔，您这话我听了三年了。”老王也不生气，切下
一小块递给他：“那你尝尝，三年前的味道变了没有？”

问题：一个水池有甲、乙两个进水管，单开甲管六小时注满，单开乙管四小时注满。两管同时打开，多少小时可以注满？解：设水池的容量为一，
甲管每小时注入六分之一，乙管每小时注入四分之一，合起来每小时注入十二分之五，所以需要十二除以五，即二点四小时。
"""
CODE = '''\
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A half-open range of whole numbers, start <= x < end."""

    start: int
    end: int

    def __len__(self) -> int:
        return max(0, self.end - self.start)

    def overlaps(self, other: "Interval") -> bool:
        return self.start < other.end and other.start < self.end


def merge(intervals: list[Interval]) -> list[Interval]:
    """Join intervals that touch or overlap; the result is sorted and has gaps between its members."""
    merged: list[Interval] = []
    for interval in sorted(intervals, key=lambda x: (x.start, x.end)):
        if merged and interval.start <= merged[-1].end:
            last = merged.pop()
            interval = Interval(last.start, max(last.end, interval.end))
        merged.append(interval)
    return merged


#include <stdio.h>

static unsigned gcd(unsigned a, unsigned b) {
    while (b != 0) {
        unsigned rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

int main(void) {
    for (unsigned n = 1; n <= 12; ++n) {
        printf("gcd(%u, 18) = %u\\n", n, gcd(n, 18));
    }
    return 0;
}
'''
CHAT = (
    {"role": "system", "content": "You are a patient tutor. Explain each step before you give the result."},
    {"role": "user", "content": "A train leaves at 9:40 and arrives at 13:05. How long does the journey take?"},
    {
        "role": "assistant",
        "content": "From 9:40 to 10:00 are 20 minutes. From 10:00 to 13:00 are 3 hours. From 13:00 to 13:05 are 5 minutes."
        " Together that is 3 hours and 25 minutes.",
    },
    {"role": "user", "content": "And if it is late by a quarter of an hour? Write the answer as a table, please."},
    {
        "role": "assistant",
        "content": "| | planned | late |\n|---|---|---|\n| departure | 9:40 | 9:40 |\n| arrival | 13:05 | 13:20 |\n"
        "| journey | 3 h 25 min | 3 h 40 min |\n\nThe train needs 15 minutes more, so the journey takes 3 hours and"
        " 40 minutes.",
    },
    {"role": "user", "content": "Thank you! What is the average speed then, if the line is 330 kilometres long?"},
)


def plain_texts() -> Mapping[str, str]:
    """Name -> text, each to be read from position 0 on."""
    licence = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8")
    return {
        "English": ENGLISH,
        "Chinese": CHINESE,
        "code": CODE,
        "licence": licence,
        "many scripts": "\n".join(oracle.mixed_texts()),
    }
