"""Made-up transcripts in the manner of QwQ-32B and QwQ-32B-Preview, each with the place where its final answer begins.

The labels were set by reading the texts, before and apart from any rule in the code. The character ‖ is the label and
no part of the text; a text holds at most one. A comment above a text says why its label is open to argument.
"""

from typing import NamedTuple


class Transcript(NamedTuple):
    """One text and its label."""

    name: str
    tagged: bool  # QwQ-32B, whose thought ends with </think>; False: Preview, which writes no tags
    marked: str  # ‖ stands where the final answer begins; no ‖: no boundary, all is the answer
    ended: bool = True  # the model ended its turn; False: cut by a limit (tagged without ‖: cut while it thought)
    causal: bool = False  # Preview: a heading line of its own or a \boxed display at ‖; a stream could switch there


TRANSCRIPTS: tuple[Transcript, ...] = (
    # QwQ-32B-Preview: headings that announce the final answer
    Transcript(
        "preview_bold_heading_and_box",
        False,
        r"""Let's see, a train covers 180 kilometers in 2.5 hours and I want its average speed.

Speed is distance over time, so that's 180 / 2.5 = 72.

To double-check: 72 * 2 is 144, and 72 * 0.5 is 36, and together they make 180. Good.

‖**Final Answer**

\[ \boxed{72} \]""",
        causal=True,
    ),
    Transcript(
        "preview_level_two_heading_and_sentence",
        False,
        r"""I need to find how many diagonals a heptagon has.
From each vertex I can reach 4 others that aren't neighbors, so 7 * 4 = 28 ends of diagonals.
But every diagonal has two ends, so I have to halve it.

‖## Final Answer
A heptagon has 14 diagonals.
""",
        causal=True,
    ),
    Transcript(
        "preview_code_draft_then_final_solution",
        False,
        r"""I have to reverse the words of a sentence but keep the letters of each word in order.

A first attempt:

```python
def rev(s):
    return s[::-1]
```

That flips the letters too, so it's not what I want. I should split first.

‖## Final Solution
To solve this, split the sentence at white space and join the words backwards.

### Approach
1. Split the text.
2. Reverse the list and join it.

### Solution Code
```python
def rev(s):
    return " ".join(reversed(s.split()))
```""",
        causal=True,
    ),
    Transcript(
        "preview_final_solution_doubted_then_again",
        False,
        r"""The sum of the first n odd numbers should be n squared.

**Final Solution**

For n = 10 the sum is 110.

Wait, 110 can't be a perfect square. I must have summed the even numbers 2 + 4 + ... + 20 instead.

The odd ones are 1 + 3 + ... + 19, ten terms with mean 10.

‖**Final Solution**

For n = 10 the sum is 100.""",
    ),
    Transcript(
        "preview_final_answer_doubted_then_other_heading",
        False,
        r"""Two coins are tossed and I know that at least one shows heads.

### Final Answer

$$ \boxed{\frac{1}{2}} $$

Hmm, hold on. That would be right if I knew which coin it was. The cases are HH, HT, TH, all equally likely.
Only one of the three has two heads.

‖## Final Solution

The conditional probability is 1/3, because one of three equally likely cases is HH.""",
    ),
    Transcript(
        "preview_zh_final_answer_heading",
        False,
        r"""小明有48颗糖，要平均分给6个同学，每人能得到几颗呢？

用除法，48除以6等于8。

验证一下，8乘以6是48，没有问题。

‖**最终答案**

\[ \boxed{8} \]""",
        causal=True,
    ),
    Transcript(
        "preview_zh_traditional_level_two_heading",
        False,
        r"""題目問的是三角形的第三個角。

已知兩個角分別是35度和75度，內角和是180度。

180減去110，剩下70度。看起來沒有別的限制條件。

‖## 最終答案

第三個角是70度。""",
        causal=True,
    ),
    Transcript(
        "preview_final_scores_list",
        False,
        r"""I'll rate each sport by how much it depends on wind.

Sailing clearly depends on it most. Archery is somewhat affected. Bowling is indoors, so not at all.

Maybe kite flying deserves even more than sailing, since without wind nothing happens whatsoever.

‖**Final Scores:**

1. Sailing: 9
2. Archery: 4
3. Bowling: 0
4. Kite flying: 10""",
        causal=True,
    ),
    Transcript(
        "preview_zh_final_scores_xml",
        False,
        r"""先看第一个，灯塔，与海上导航直接有关，应该给高分。

第二个是路灯，虽然也发光，但和航海没有关系。

第三个是罗盘，它是导航工具，但不发光，给中间的分数比较合理。

‖### 最终评分
```xml
<number>1</number><score>9</score>
<number>2</number><score>1</score>
<number>3</number><score>5</score>
```""",
        causal=True,
    ),
    Transcript(
        "preview_english_heading_after_chinese_monologue",
        False,
        r"""Okay, I need to decide which of the three rivers is the longest.

The Nile is usually given as about 6,650 km, and then 亚马逊河大约是6400公里，长江大约是6300公里。

不过有些测量认为亚马逊河更长，但是题目说的是传统的说法，所以按传统的说法来比较。

‖**Final Answer**

The Nile""",
        causal=True,
    ),
    Transcript(
        "preview_answer_heading_multiple_choice",
        False,
        r"""Which gas do plants take in for photosynthesis?

(A) Oxygen - that's what they give off.
(B) Nitrogen - taken up through roots as nitrate, not as a gas for this.
(C) Carbon dioxide - this one is fixed in the Calvin cycle.
(D) Helium - inert.

‖**Answer**

(C) Carbon dioxide""",
        causal=True,
    ),
    Transcript(
        "preview_zh_multiple_choice_heading",
        False,
        r"""下列成语中哪一个没有写错字？

A. 迫不急待——应该是“迫不及待”，错了。
B. 再接再厉——这个写法是对的。
C. 谈笑风声——应该是“谈笑风生”。
D. 一股作气——应该是“一鼓作气”。

只剩下B了，再看一遍也没有发现问题。

‖**答案：**

B""",
        causal=True,
    ),
    Transcript(
        "preview_final_table_heading",
        False,
        r"""I want to compare the three loans by their total cost.

- Loan A: 12 months at 95 is 1140.
- Loan B: 24 months at 50 is 1200.
- Loan C: 6 months at 185 is 1110.

I think a table is the clearest way to give this.

‖## Final Answer

| Loan | Months | Total |
|------|--------|-------|
| A    | 12     | 1140  |
| B    | 24     | 1200  |
| C    | 6      | 1110  |""",
        causal=True,
    ),
    Transcript(
        "preview_final_code_only",
        False,
        r"""The query must count the orders of each customer, also of customers without any.

An inner join would lose those, so it has to be a left join, and COUNT(*) would count 1 for them.

Therefore I count the order id, which is NULL where there is no order.

‖**Final Code**

```sql
SELECT c.name, COUNT(o.id) AS orders
FROM customers c LEFT JOIN orders o ON o.customer_id = c.id
GROUP BY c.name;
```""",
        causal=True,
    ),
    Transcript(
        "preview_answer_heading_with_colon_plain_text_after",
        False,
        r"""So the riddle says: the more you take, the more you leave behind.

Time? No, you don't leave time behind by taking it. Photographs? Hmm, not really.

Footsteps! You take them, and they stay on the ground behind you.

‖### Final Answer:

Footsteps. Each step you take leaves one more print behind.

I hope that helps.""",
        causal=True,
    ),
    # The heading's line also carries the answer: a boundary, but no heading line of its own, so not causal.
    Transcript(
        "preview_heading_and_answer_on_one_line",
        False,
        r"""A dozen eggs costs $3.60 and I need the price of 5 eggs.

One egg is 3.60 / 12 = 0.30.

Five of them: 5 * 0.30 = 1.50.

‖**Final Answer:** $1.50""",
    ),
    # A plain line "Final answer:" without any mark-up could also be read as a closing sentence.
    Transcript(
        "preview_plain_heading_line",
        False,
        r"""Let me list the primes between 20 and 40: 23, 29, 31, 37.

What about 27? That's 3 cubed. And 33 and 39 are multiples of 3 as well.

‖Final answer:

There are 4 primes between 20 and 40.""",
        causal=True,
    ),
    Transcript(
        "preview_zh_heading_doubted_then_again",
        False,
        r"""甲乙两人合作完成一项工程，甲单独做要6天，乙单独做要3天。

**最终答案**

\boxed{4.5}

等等，两个人一起做怎么会比乙一个人做还慢呢？我把时间取平均了，这是不对的。

应该把效率相加：1/6加1/3等于1/2，也就是每天完成一半。

‖**最终答案**

\boxed{2}""",
    ),
    Transcript(
        "preview_three_final_answers",
        False,
        r"""**Final Answer**

Tuesday

But wait, the meeting was moved by nine days, not by eight.

**Final Answer**

Wednesday

Hmm, nine days after Monday is a week plus two days, so I'm at Wednesday again. Did it start on a Monday, though?
The note says "the first of March", and in that year it was a Friday. Nine days on is a Sunday.

‖**Final Answer**

Sunday""",
    ),
    # QwQ-32B-Preview: headings of the thought, blocks under many headings
    Transcript(
        "preview_six_headings_with_steps",
        False,
        r"""**Problem Analysis:**
A tank fills at 4 liters a minute and leaks 1 liter a minute.

### Step 1
The net rate is 4 - 1 = 3 liters a minute.

### Step 2
The tank holds 90 liters.

### Step 3
90 / 3 = 30 minutes.

**Verification:**
In 30 minutes 120 liters flow in and 30 leak out, which leaves 90.

‖## Final Solution
The tank is full after 30 minutes.""",
        causal=True,
    ),
    # "**Solution:**" at the top opens the working; the answer proper comes under the last heading. A reader of the
    # stream may well have switched at "**Solution:**", so causal could be argued the other way.
    Transcript(
        "preview_six_headings_from_solution",
        False,
        r"""**Solution:**

### Step 1
Write 2^x = 32 with a power on both sides: 32 = 2^5.

### Step 2
Compare the exponents, x = 5.

### Step 3
Is there a second root? 2^x rises strictly, so no.

#### Check
2^5 = 2 * 2 * 2 * 2 * 2 = 32.

‖## Final Solution

x = 5""",
        causal=True,
    ),
    Transcript(
        "preview_zh_six_headings",
        False,
        r"""**分析**
鸡兔同笼，共有10个头，28只脚。

### 第一步
假设全是鸡，就有20只脚。

### 第二步
多出28-20=8只脚。

### 第三步
每把一只鸡换成兔，多2只脚，所以兔有4只。

**检验**
4只兔16只脚，6只鸡12只脚，合计28只脚。

‖**最终答案**
鸡6只，兔4只。""",
        causal=True,
    ),
    Transcript(
        "preview_thought_headings_then_answer",
        False,
        r"""**Initial Thoughts**

A clock loses 5 minutes every hour. It was set right at noon and now shows 5:30.

**Wrong Approach**

Adding 5 minutes for each hour shown gives 5:57, but the clock's hours aren't real hours.

**Correct Approach**

It shows 55 minutes for each 60 real ones. So 330 shown minutes are 330 * 60 / 55 = 360 real minutes.

‖**Final Answer**

\[ \boxed{6{:}00} \]""",
        causal=True,
    ),
    Transcript(
        "preview_correct_approach_and_no_answer",
        False,
        r"""**Alternative Idea:**

Light the candle at both ends and wait.

**Correct Approach:**

1. Cut the candle in half, but then the halves may burn at different rates.
2. Weigh the wax before and after, but there's no scale in the room.

**Another Approach:**

Use the drip of the tap as a clock, but it isn't said that it drips evenly.""",
    ),
    Transcript(
        "preview_zh_traditional_thought_heading_without_answer",
        False,
        r"""**正確的思路**

先把三個人的話列出來。甲說乙在說謊，乙說丙在說謊，丙說甲和乙都在說謊。

**另一種思路**

也可以從丙開始，假設丙說的是真話，那麼甲說謊，乙也說謊，這樣乙的話就是假的，
意思是丙沒有說謊，這部分倒是相符的。可是甲說乙說謊，而甲的話是假的，又得出乙說真話，矛盾。

還要再看丙說謊的情形，暫時想不清楚。""",
    ),
    Transcript(
        "preview_final_answer_spoken_of_in_sentence",
        False,
        r"""The instructions say that I should put the **Final Answer** into square brackets and nothing else.

The capital of Australia isn't Sydney, and it isn't Melbourne either, though Melbourne was the seat of government once.

It's Canberra, founded in 1913 as a compromise between the two.

‖So the answer is [Canberra].""",
    ),
    Transcript(
        "preview_line_begins_with_bold_words_of_a_sentence",
        False,
        r"""My teacher's template has three parts, and I never know what belongs where.

**Final Answer** is what she calls the third part, and it should be short. The first two are only for the working.

I could put the unit into the working, or into the third part, or into both. There are points for and against each.

Anyway, that's as far as the template goes.""",
    ),
    Transcript(
        "preview_heading_quoted_in_markdown_fence",
        False,
        r"""The user wants a report in this shape:

```markdown
## Summary
...
## Final Answer
...
```

I can leave out the summary, since the question is only which planet has the shortest day.

Jupiter turns in just under ten hours; Saturn needs a bit over ten and a half.

‖## Final Answer
Jupiter, with a day of about 9 hours and 56 minutes.""",
        causal=True,
    ),
    Transcript(
        "preview_heading_like_comment_in_code",
        False,
        r"""Maybe I can check it with a few lines of Python:

```python
total = 0
for i in range(1, 101):
    total += i
# Final Answer
print(total)
```

That would print 5050, which matches the formula 100 * 101 / 2.

‖Therefore, the sum is 5050.""",
    ),
    # QwQ-32B-Preview: closing sentences
    Transcript(
        "preview_closing_sentence_own_paragraph",
        False,
        r"""Alright, we have a family puzzle. Nora is Ben's sister. Ben is Lea's father.

So Nora is the sister of Lea's father.

That makes her an aunt. There's nothing in the statements that suggests a step-family or the like.

‖So the answer is that Nora is Lea's aunt.""",
    ),
    Transcript(
        "preview_closing_sentence_ends_paragraph",
        False,
        r"""How many minutes are in a week? A day has 24 hours, an hour 60 minutes.
24 * 60 = 1440 for a day, and 1440 * 7 = 10080. Yes, 9800 + 280. ‖Thus, the answer is 10080 minutes.""",
    ),
    Transcript(
        "preview_zh_closing_sentence",
        False,
        r"""一个长方形的周长是26厘米，长是8厘米，要求面积。

长加宽等于13厘米，所以宽是5厘米。

面积就是8乘5，等于40平方厘米，单位也不要忘记。

‖因此，答案是40平方厘米。""",
    ),
    Transcript(
        "preview_zh_traditional_closing_within_paragraph",
        False,
        r"""這首詩寫的是「床前明月光」，作者應該是唐代的詩人。

有人會想到杜甫，但是杜甫的風格不同，而且《靜夜思》收在李白的詩集裡，這一點沒有爭議。‖所以，答案是李白。""",
    ),
    Transcript(
        "preview_closing_sentence_repeated",
        False,
        r"""The word "strawberry": s, t, r, a, w, b, e, r, r, y.

I count r at the third, eighth and ninth place. So the answer is 3.

Let me spell it backwards to be safe: y, r, r, e, b, w, a, r, t, s. Again three.

So the answer is 3. Although some people only hear two of them, the spelling decides.

‖Therefore, the answer is 3.""",
    ),
    Transcript(
        "preview_sentence_doubted_other_sentence_later",
        False,
        r"""If I fold the paper three times, I get 6 layers. So the answer is 6.

No wait, every fold doubles the layers; it doesn't add two.

One fold gives 2, two folds give 4, three folds give 8.

‖So, the answer is 8 layers.""",
    ),
    Transcript(
        "preview_sentence_doubted_and_no_conclusion",
        False,
        r"""The author of the letter must be the gardener. So the answer is the gardener.

But wait, the gardener couldn't write, it says so in the second chapter.

Then it could be the cook, or the niece who came in spring. The cook was away on that day, or at least she said so.

The niece has no motive that I can see. Perhaps there's a page missing from what I was given.""",
    ),
    Transcript(
        "preview_zh_sentence_doubted_and_no_conclusion",
        False,
        r"""这个数除以3余2，除以5余3，最小的应该是8。因此，答案是8。

不对，题目还说除以7余2，而8除以7余1。

那么再往后看，23除以7余2，可是题目又要求它是偶数。

偶数的话要加105，得到128，但是题目说不超过100，这样就没有合适的数了，也许题目抄错了。""",
    ),
    Transcript(
        "preview_multiple_choice_closing_sentence",
        False,
        r"""Let me go through the options.

A) 3/8 = 0.375
B) 2/5 = 0.4
C) 5/12 = 0.4166...
D) 1/3 = 0.333...

The largest one among these is 5/12.

‖So the correct option is C.""",
    ),
    Transcript(
        "preview_mixed_closing_sentence_zh_before_scores",
        False,
        r"""The theme is "things that keep time", and the anti-examples are calendars.

- Sundial: fits well.
- Diary: 更像是日历，和反例相近。
- Metronome: 保持节拍，也算是计时的一种。

再比较一下，日晷是最典型的，节拍器稍差一点。

‖因此，最终评分如下：

<number>1</number><score>9</score>
<number>2</number><score>1</score>
<number>3</number><score>6</score>""",
    ),
    Transcript(
        "preview_closing_sentence_requested_tag",
        False,
        r"""The format asks for <ANSWER>n</ANSWER>, where n is the number of the option.

Option 1 is uncle, option 2 is cousin, option 3 is nephew.

Tom's mother and Ida's mother are sisters, which makes Tom and Ida cousins.

‖So, the answer is <ANSWER>2</ANSWER>.""",
    ),
    Transcript(
        "preview_closing_sentence_before_code",
        False,
        r"""The loop `for i in range(len(xs)): xs.pop(i)` skips elements, since the list shrinks under it.

Going backwards avoids that, but it is still odd to read. A slice assignment is enough.

‖So, my final answer is:

```python
xs[:] = [x for x in xs if keep(x)]
```""",
    ),
    Transcript(
        "preview_inline_box_in_closing_sentence",
        False,
        r"""I have to find the remainder of 7^100 divided by 6.

Since 7 leaves 1 modulo 6, every power of it leaves 1 as well.

‖Thus, the final answer is $\boxed{1}$.""",
    ),
    Transcript(
        "preview_zh_inline_box_in_closing_sentence",
        False,
        r"""设这个数为x，那么3x加7等于34。

移项，3x等于27，x等于9。代回去，27加7是34，正确。

‖综上，最终答案是 \(\boxed{9}\)。""",
    ),
    Transcript(
        "preview_closing_sentence_box_and_remark",
        False,
        r"""The chance that a single roll isn't a six is 5/6.

For four rolls in a row it's (5/6)^4 = 625/1296.

The complement is what was asked for.

‖So, my final answer is:

\[ \boxed{\frac{671}{1296}} \]

Which is slightly more than one half.""",
    ),
    # QwQ-32B-Preview: boxes without a heading
    Transcript(
        "preview_bare_box_line",
        False,
        r"""Solve 5(x - 2) = 3x + 4.

Expanding gives 5x - 10 = 3x + 4, then 2x = 14.

Dividing by two and putting it back: 5 * 5 = 25 and 3 * 7 + 4 = 25. Both sides agree.

‖\boxed{7}""",
        causal=True,
    ),
    Transcript(
        "preview_bracket_display_box",
        False,
        r"""We need the area between y = x and y = x^2 on [0, 1].

The line lies above, and the integral of x - x^2 is x^2/2 - x^3/3.

At 1 this is 1/2 - 1/3, at 0 it vanishes.

‖\[ \boxed{\dfrac{1}{6}} \]
""",
        causal=True,
    ),
    Transcript(
        "preview_dollar_display_box",
        False,
        r"""gcd(84, 126): I subtract, 126 - 84 = 42, and 84 is twice 42.

Both numbers are multiples of 42, and 126 is three times it. There can't be a larger divisor.

‖$$\boxed{42}$$""",
        causal=True,
    ),
    Transcript(
        "preview_zh_dollar_display_box",
        False,
        r"""等差数列的首项是3，公差是4，求第10项。

第10项比首项多9个公差，3加36。

再数一遍：3、7、11、15、19、23、27、31、35、39，刚好十个数。

‖$$ \boxed{39} $$""",
        causal=True,
    ),
    Transcript(
        "preview_zh_traditional_bare_box",
        False,
        r"""從5個人裡選出2個人，順序不重要。

5乘4是20，每一對數了兩次，要除以2。

如果把五個人叫做甲乙丙丁戊，一對一對寫出來，也剛好是十對。

‖\boxed{10}
""",
        causal=True,
    ),
    # The display spans three lines; it begins with its opening bracket, not with the line of the command.
    Transcript(
        "preview_display_over_three_lines",
        False,
        r"""The determinant of the matrix with rows (2, 3) and (1, 4): multiply along the diagonals.

2 * 4 is 8 and 3 * 1 is 3, subtract the second from the first.

‖\[
\boxed{5}
\]""",
        causal=True,
    ),
    Transcript(
        "preview_box_display_doubted_then_second",
        False,
        r"""How many handshakes are there among 6 people?

Each of the 6 shakes 5 hands.

\[ \boxed{30} \]

Hmm, but then I've counted each handshake from both sides. A shakes B and B shakes A is one handshake only.

Half of thirty, then.

‖\[ \boxed{15} \]""",
    ),
    Transcript(
        "preview_guess_box_in_sentence_then_heading",
        False,
        r"""My first guess would be \boxed{12}, because 3 * 4 = 12, but I haven't used that the boxes are stacked.

Each layer has 3 rows of 4 boxes and there are 5 layers.

12 * 5 = 60, so the guess was for one layer only.

‖**Final Answer**

\boxed{60}""",
        causal=True,
    ),
    Transcript(
        "preview_zh_guess_box_in_sentence_then_display",
        False,
        r"""一开始我猜是 $\boxed{16}$，不过这只是把两个数加了起来，没有考虑题目里的倍数关系。

哥哥的年龄是弟弟的3倍，两人一共16岁，所以弟弟是一份，哥哥是三份。

16除以4等于4，弟弟4岁，哥哥就是三个4。

‖\[\boxed{12}\]""",
        causal=True,
    ),
    Transcript(
        "preview_guess_box_and_nothing_else",
        False,
        r"""If the pattern were doubling, then the next one would be \boxed{32}, but the sequence is 1, 2, 4, 8, 16, 31 in my
notes, from cutting a circle with chords.

With five points I do get 16 pieces. With six I count 30 or 31, depending on whether three chords meet in one point.

I'd have to draw it properly to be sure, and I can't do that here.""",
    ),
    # QwQ-32B-Preview: short direct replies and texts without a conclusion
    Transcript(
        "preview_direct_clue",
        False,
        """CLUE: You hear it before the rain, but after the flash.
WORDS: 1""",
    ),
    Transcript(
        "preview_direct_zh_greeting",
        False,
        """你好！我是一个语言模型，很高兴和你聊天。
你今天想聊些什么呢？""",
    ),
    Transcript(
        "preview_direct_haiku",
        False,
        """Moss on the stone steps -
a snail takes the whole morning
to cross one shadow""",
    ),
    Transcript(
        "preview_direct_list_bold_terms",
        False,
        """Here are three ways to keep bread fresh:

1. **Bread box** - keeps out light and draft.
2. **Linen bag** - lets moisture out slowly, so that the crust stays crisp.
3. **Freezer** - for anything that you won't eat within three days.""",
    ),
    Transcript(
        "preview_direct_zh_traditional_recipe",
        False,
        """### 蔥油拌麵

**材料**：麵條兩把、青蔥五根、醬油三匙、糖一匙。

**做法**：
1. 小火把蔥段炸到金黃。
2. 醬油和糖下鍋煮開。
3. 淋在煮好的麵上拌勻。""",
    ),
    Transcript(
        "preview_code_in_monologue_no_conclusion",
        False,
        r"""I need a function that tells whether a year is a leap year.

Divisible by 4, except centuries, except every fourth century.

```python
def leap(y):
    return y % 4 == 0 and (y % 100 != 0 or y % 400 == 0)
```

For 1900 this gives False and for 2000 True, as it should. Negative years work too, if one counts that way.

In summary, the function tests the three rules in one expression, and there is no need for a table of years.""",
    ),
    Transcript(
        "preview_zh_musing_no_conclusion",
        False,
        """为什么天空是蓝色的，而傍晚又会变红呢？

也许可以从散射说起。短波长的光更容易被空气分子散射，所以白天从四面八方来的光偏蓝。

傍晚的时候，阳光穿过的空气更厚，蓝光在路上就散掉了，剩下的偏红。

当然，云和灰尘也会有影响，这里面还有许多细节可以讨论。""",
    ),
    # QwQ-32B-Preview: cut by a limit
    Transcript(
        "preview_cut_before_boundary",
        False,
        r"""I'm looking for a four-digit number whose digits sum to 9 and which doesn't change when read backwards.

So it has the form abba with 2(a + b) = 9, but 9 is odd, so that can't work. Unless the number may have a leading

Wait, maybe "digits" means different digits. Then a + b = 9 and I could take""",
        ended=False,
    ),
    Transcript(
        "preview_zh_cut_before_boundary",
        False,
        """要判断哪一个词最能概括这些例子，先看它们的共同点。

第一个例子是钥匙，第二个例子是密码，第三个例子是指纹，它们都和开锁有关。

反例是门把手，它和门有关，但不能用来确认身份，所以主题可能是""",
        ended=False,
    ),
    Transcript(
        "preview_cut_after_heading_with_text",
        False,
        r"""The tree has to stay balanced after each insert, so a plain binary tree is out.

I think a skip list would be the easiest to explain, since it needs no rotations.

‖## Final Solution
Use a skip list. Every node carries a tower of forward pointers whose height is drawn at random, with a chance of one
half for each further""",
        ended=False,
        causal=True,
    ),
    Transcript(
        "preview_zh_cut_after_heading_with_text",
        False,
        r"""这道题要写一封请假信，语气要礼貌，篇幅不要太长。

开头写称呼，中间说明原因和时间，最后表示感谢。

‖**最终答案**

尊敬的王老师：

您好！我因为感冒发烧，医生建议在家休息两天，特此向您请""",
        ended=False,
        causal=True,
    ),
    Transcript(
        "preview_cut_right_after_heading",
        False,
        """A cube has 12 edges; every corner touches three of them, and there are 8 corners.

8 * 3 / 2 = 12, so both ways of counting agree.

**Final Answer**

""",
        ended=False,
    ),
    Transcript(
        "preview_cut_in_a_loop",
        False,
        """Statement 4 says that the red house is left of the green one.

Wait, no, statement 4 says that the green house is left of the red one.

Wait, no, statement 4 says that the red house is left of the green one.

Wait, no, statement 4 says that the green house is left of the red one.

Wait, no, statement 4 says""",
        ended=False,
    ),
    # QwQ-32B: the tag in its usual place
    Transcript(
        "tagged_math",
        True,
        r"""Okay, a shirt costs $40 and there's a 15% discount. 10% of 40 is 4, 5% is 2, so 15% is 6.

So the price is 40 - 6 = 34. Let me check with 0.85 * 40 = 34. Yes.
</think>‖

The discount is \( 0.15 \times 40 = 6 \) dollars.

**Final Answer:** The shirt costs \(\boxed{34}\) dollars.""",
    ),
    Transcript(
        "tagged_zh",
        True,
        """嗯，用户问的是怎么泡绿茶。水温不能太高，八十度左右比较合适，太烫会把茶叶烫熟，味道发苦。

时间大概两三分钟，还可以提醒用户先温杯。
</think>‖

泡绿茶的要点：

1. 水温约80℃，不要用刚烧开的水。
2. 每150毫升水放3克茶叶。
3. 泡2到3分钟即可饮用。""",
    ),
    Transcript(
        "tagged_zh_traditional_own_open_tag",
        True,
        """<think>
好的，使用者想知道「塞翁失馬」的意思。這個成語出自《淮南子》，講的是禍福相倚。

要簡短一點，再給一個例句就可以了。
</think>‖

「塞翁失馬」比喻壞事有時會變成好事。

例句：他錯過了那班車，卻因此避開了事故，真是塞翁失馬。""",
    ),
    Transcript(
        "tagged_own_open_tag",
        True,
        """<think>
The user says hi. I'll greet back and ask what they need.
</think>‖

Hi there! What can I do for you today?""",
    ),
    Transcript(
        "tagged_empty_thought",
        True,
        """<think>

</think>‖

Paris.""",
    ),
    Transcript(
        "tagged_multiple_choice",
        True,
        """Let's look at the options. A is mercury, which is liquid. B is bromine, liquid as well, but it's not a metal.
The question asks for a non-metal that's liquid at room temperature. So B it is, I'm sure.
</think>‖

**B.** Bromine is the only non-metal that is liquid at room temperature.""",
    ),
    Transcript(
        "tagged_table",
        True,
        """Hmm, they want the tax for three incomes at a flat rate of 20%.

| income | tax? |
|--------|------|
| 100    | 20   |

And so on: 250 gives 50, 400 gives 80. I'll write it out in full below.
</think>‖

| Income | Tax at 20% |
|-------:|-----------:|
| 100    | 20         |
| 250    | 50         |
| 400    | 80         |""",
    ),
    Transcript(
        "tagged_code",
        True,
        """Need a shell one-liner that counts the lines of all Python files. A draft:

```sh
wc -l *.py
```

That doesn't go into folders, so find is needed, and the names may hold spaces.
</think>‖

```sh
find . -name '*.py' -print0 | xargs -0 cat | wc -l
```

`-print0` and `-0` keep names with spaces in one piece.""",
    ),
    Transcript(
        "tagged_text_follows_at_once",
        True,
        """Is 91 prime? 7 * 13 = 91, so it isn't. They want yes or no.
</think>‖No. 91 is 7 times 13.""",
    ),
    Transcript(
        "tagged_zh_follows_at_once",
        True,
        """用户问水的化学式，这个很简单，就是两个氢原子和一个氧原子。
直接回答就好。</think>‖水的化学式是H₂O。""",
    ),
    Transcript(
        "tagged_tag_ends_a_sentence",
        True,
        """The user wants a synonym for "quick". There's fast, rapid, swift.
I'd go with "swift", it has the same tone.</think>‖

Swift""",
    ),
    Transcript(
        "tagged_english_thought_zh_answer",
        True,
        """The question is in Chinese, so I should answer in Chinese. It asks for the tallest mountain on Earth above sea level.
That's Everest, 8848.86 m by the survey of 2020.
</think>‖

世界最高峰是珠穆朗玛峰，海拔8848.86米。""",
    ),
    # QwQ-32B: things inside the thought that are no boundary
    Transcript(
        "tagged_final_answer_inside_thought",
        True,
        r"""A rectangle has sides 6 and 8, so the diagonal is the root of 36 + 64 = 100.

So it's 10. I'm confident.

**Final Answer**
\boxed{10}
</think>‖

By the theorem of Pythagoras the diagonal is \( \sqrt{6^2 + 8^2} = 10 \).

**Final Answer**
\boxed{10}""",
    ),
    Transcript(
        "tagged_zh_final_answer_inside_thought",
        True,
        r"""先算总价，3本书每本12元，一共36元。付了50元，应该找回14元。

**最终答案**

\[ \boxed{14} \]

等一下，题目里还有一张2元的优惠券，那就应该找回16元。
</think>‖

总价：3 × 12 = 36（元），用券后34元，找回50 - 34 = **16元**。""",
    ),
    Transcript(
        "tagged_answer_tag_quoted_in_thought",
        True,
        """The system prompt says: give the result as <answer>word</answer>. I must not forget this.

<answer>tide</answer> would be a good guess, but "moon" is the cause and not the effect. They ask for the effect.

So tide stays.
</think>‖

<answer>tide</answer>""",
    ),
    Transcript(
        "tagged_zh_answer_tag_spoken_of_in_thought",
        True,
        """题目要求把结果写在 <答案> 和 </答案> 之间，这个格式要注意。

红色加黄色是橙色，这个没有疑问。
</think>‖

红色和黄色混合得到橙色。""",
    ),
    Transcript(
        "tagged_tag_inside_open_code_fence",
        True,
        """The user wants to see how to swap two variables in Python. I can write

```python
a, b = b, a
</think>‖

Use a tuple assignment:

```python
a, b = b, a
```""",
    ),
    Transcript(
        "tagged_zh_tag_inside_open_code_fence",
        True,
        """用户想要一个判断回文的函数，先写个草稿：

```python
def is_pal(s):
    return s == s[::-1]

</think>‖

下面的函数把字符串和它的倒序比较：

```python
def is_pal(s):
    return s == s[::-1]
```""",
    ),
    Transcript(
        "tagged_tag_quoted_in_fence_then_real",
        True,
        """They ask how to strip the thought from a log file. The log looks like this:

```
some thought
</think>
some answer
```

So it's enough to cut everything up to that line. With sed that's an address range.
</think>‖

Delete from the first line up to the closing tag with a range in `sed`, and keep the rest.""",
    ),
    # QwQ-32B: two or more tags
    Transcript(
        "tagged_two_tags_text_after_last",
        True,
        """1. Lisbon
2. Oslo
3. Bern
</think>

1. Lisbon
2. Oslo
3. Zurich

Wait, the capital of Switzerland is Bern and not Zurich. I had it right before. Let me fix the list.
</think>‖

1. Lisbon
2. Oslo
3. Bern""",
    ),
    Transcript(
        "tagged_two_tags_nothing_after_last",
        True,
        """The antonym of "ascend" is "descend". Nothing more to say here.
</think>‖

descend
</think>""",
    ),
    Transcript(
        "tagged_zh_two_tags_white_space_after_last",
        True,
        """今天是星期三，再过十天是星期几？十天就是一周零三天，所以是星期六。
</think>‖

再过十天是星期六。

</think>


""",
    ),
    Transcript(
        "tagged_mixed_three_tags",
        True,
        """The user asks for "thank you" in Mandarin. 谢谢, pinyin xièxie.
</think>

谢谢 (xiexie)
</think>

Hmm, 我应该加上声调, the tone marks are missing.
</think>‖

谢谢 (xièxie)""",
    ),
    # QwQ-32B: no tag, but an ended turn
    Transcript(
        "tagged_no_tag_ended",
        True,
        """<number>1</number><score>4</score>
<number>2</number><score>0</score>
<number>3</number><score>8</score>""",
    ),
    Transcript(
        "tagged_no_tag_ended_with_heading",
        True,
        r"""To find the mean, add the five marks and divide by five.

The sum is 3 + 4 + 4 + 5 + 4 = 20.

**Final Answer**

\[ \boxed{4} \]""",
    ),
    Transcript(
        "tagged_zh_no_tag_ended",
        True,
        """春天适合种的蔬菜有：

- 菠菜：耐寒，早春就可以播种。
- 黄瓜：等气温稳定在15℃以上再种。

因此，答案是看你那里的气温而定。""",
    ),
    # QwQ-32B: translated tags
    Transcript(
        "tagged_zh_translated_close_tag",
        True,
        """用户要把“时间就是金钱”翻译成英文，这是一句常见的谚语。

直接给出译文，不需要解释。
</思考>‖

Time is money.""",
    ),
    Transcript(
        "tagged_zh_translated_close_tag_odd_bracket",
        True,
        """<think>
一年有四个季度，三个季度就是九个月。这样算没有问题，一个季度三个月。
‹/思考>‖

三个季度是九个月。""",
    ),
    Transcript(
        "tagged_zh_traditional_translated_pair",
        True,
        """<思考>
題目要我用一個詞形容這幅畫。畫裡是黃昏的海邊，沒有人，顏色很淡。

「寧靜」比「荒涼」好，因為畫面是暖色的。
</思考>‖寧靜""",
    ),
    Transcript(
        "tagged_mixed_translated_close_tag",
        True,
        """Okay, the user wants the plural of "ox". It's irregular: oxen, 不是 oxes。

I can add one more example of the same kind, like children.
</思考>‖

The plural of "ox" is **oxen**, formed like "children".""",
    ),
    Transcript(
        "tagged_zh_answer_tag_own_line",
        True,
        """比较三个分数的大小，通分以后是15/30、20/30和18/30。

所以最大的是20/30，也就是2/3。

<答案>‖
三个分数中最大的是2/3。
</答案>""",
    ),
    Transcript(
        "tagged_zh_answer_tag_odd_bracket",
        True,
        """先看选项，甲是鲸，乙是鲨，丙是海豚，问哪一个不是哺乳动物。

鲸和海豚都用肺呼吸，鲨是鱼，用鳃呼吸。

‹答案>‖
乙""",
    ),
    Transcript(
        "tagged_zh_answer_tag_text_on_its_line",
        True,
        """用户问中国最长的河。黄河是第二长，最长的是长江，全长约6300公里。
题目只要名称，不要长度。
<答案>‖长江</答案>""",
    ),
    # QwQ-32B: cut by a limit
    Transcript(
        "tagged_cut_while_thinking",
        True,
        """Let me think of a word that links "paper", "rain" and "over". Paper coat? Raincoat, overcoat, hmm, paper coat isn't a
thing, though.

Maybe "bow": rainbow, but overbow? What about "fall": rainfall, and then""",
        ended=False,
    ),
    Transcript(
        "tagged_zh_cut_while_thinking_own_open_tag",
        True,
        """<think>
嗯，这个问题需要分情况讨论。如果a大于零，那么抛物线开口向上，最小值在顶点。

如果a小于零，那么最大值在顶点，而区间的两端""",
        ended=False,
    ),
    Transcript(
        "tagged_cut_in_thought_after_final_answer",
        True,
        r"""The volume of the cylinder is pi * 3^2 * 5 = 45 pi.

**Final Answer**

\[ \boxed{45\pi} \]

Wait, is 3 the radius or the diameter? The text says "3 cm across", so""",
        ended=False,
    ),
    Transcript(
        "tagged_cut_in_answer",
        True,
        """A short story about a lighthouse keeper. I'd start with the storm and keep the tone calm.
</think>‖

On the third night of the storm, Maren climbed the stairs with a lamp in each hand. The great light had gone out at""",
        ended=False,
    ),
    Transcript(
        "tagged_cut_right_after_tag",
        True,
        """They want the square of 25, which is 625.
</think>‖""",
        ended=False,
    ),
    # QwQ-32B: answers that speak of thinking or of the opening tag
    Transcript(
        "tagged_answer_speaks_of_think",
        True,
        """The user asks for the past tense of "think". It's irregular.
</think>‖

The past tense of "think" is "thought", as in: I think today, I thought yesterday.

Think of "bring" and "brought", which go the same way.""",
    ),
    Transcript(
        "tagged_answer_speaks_of_open_tag",
        True,
        """<think>
The question is where the log of a reasoning model begins. I'll name the opening tag and say what stands in front.
</think>‖

The thought begins with `<think>`, often written by the chat template and not by the model:

```
assistant
<think>
```

So a log may well lack <think> at its start.""",
    ),
    Transcript(
        "tagged_zh_answer_speaks_of_open_tag",
        True,
        """用户问 <think> 是什么意思，这是推理模型用来标记思考开始的标签，简单解释一下就行。
</think>‖

<think> 是一个开始标签，表示后面的内容是模型的思考过程，不属于正式的回答。""",
    ),
)
