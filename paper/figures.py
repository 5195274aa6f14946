"""Draw three figures for reading along: `python -m paper.figures` writes paper/results/figures/.

    group.svg       the eight responses of toy/step.md, token by token, coloured by advantage
    prompts.svg     what rpt.accumulate keeps alive: the prompts, their leaves, the slices
    entropies.svg   the document of toy/step.md, the entropy before each token, the question
"""

from pathlib import Path

import train
from data import Tokenizer, load_corpus, select_positions
from eval import corpus_entropy
from model import load_pretrained
from paper.report import SVG_STYLE
from rpt import Policy
from toy.step import sample

FIGURE = """<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" aria-label="{0}"
viewBox="0 0 880 275"><style>{1}
.plot{{color:#424a53}}@media(prefers-color-scheme:dark){{.plot{{color:#b7bfc8}}}}
.c9{{--c:#8c959f}}.plot rect{{fill:var(--c);fill-opacity:.3}}.plot .bar{{fill-opacity:1}}
.response g:last-child rect{{stroke:var(--c);stroke-width:2}}
.mono{{font:12px ui-monospace,Menlo,monospace}}.mid{{text-anchor:middle}}.small{{font-size:12px}}
.flow path{{fill:none;stroke:currentColor;stroke-width:1.5;marker-end:url(#to)}}
.back path{{stroke:var(--c);stroke-dasharray:5 3}}</style>{2}</svg>
"""
TOKEN = """<g class="{0}" transform="translate({1:.1f} 0)"><rect width="{2:.1f}" height="20"/>
<rect class="bar" y="-{3:.1f}" width="{2:.1f}" height="{3:.1f}"/>
<text class="mono" x="2" y="14"><![CDATA[{4}]]></text></g>"""
RESPONSE = """<g transform="translate(0 {0})"><text x="8" y="14">A = {1:+.3f}</text>
<g class="response">{2}</g></g>"""
LEGEND = """
<rect class="c0" x="100" y="211" width="14" height="14"/><text x="120" y="223">A &gt; 0: likelier
</text><rect class="c1" x="230" y="211" width="14" height="14"/><text x="250" y="223">A &lt; 0: less
likely</text><rect class="c9" x="370" y="211" width="14" height="14"/><text x="390" y="223">A = 0:
only if all eight rewards are equal</text><text x="100" y="247">The end token (framed) is trained
too, and nothing after it. A dot is a space, ⏎ a line break.</text>"""
SCALE = """
<path class="grid" d="M60 158H880M60 133H880M60 108H880M60 83H880M60 58H880M60 33H880"/>
<g class="small"><text x="36" y="162">0</text><text x="36" y="137">0.5</text>
<text x="36" y="112">1.0</text><text x="36" y="87">1.5</text><text x="36" y="62">2.0</text>
<text x="36" y="37">2.5</text></g><text x="8" y="16">nats</text>
<text x="100" y="208">Chosen (orange): more than 0.5 nats, in the solution, after ⏎⏎.</text>
<text x="100" y="230">How a story goes on is uncertain too, but cannot be found by reasoning.</text>
<g transform="translate(0 160)">{}</g>"""
PROMPTS = """
<defs><marker id="to" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">
<path d="M0 0L6 3L0 6z" fill="currentColor"/></marker></defs>
<g class="c9"><rect x="10" y="60" width="110" height="36"/>
<rect x="10" y="106" width="110" height="36"/></g>
<g class="c0"><rect x="210" y="60" width="130" height="82"/>
<rect x="440" y="60" width="130" height="82"/></g>
<g class="c2"><rect x="660" y="14" width="190" height="48"/>
<rect x="660" y="77" width="190" height="48"/><rect x="660" y="140" width="190" height="48"/></g>
<g class="mid"><text x="65" y="83">prompt 1</text><text x="65" y="129">prompt 2</text>
<text x="275" y="84">roots</text><text x="505" y="84">leaves</text>
<text x="755" y="34">slice 1</text><text x="755" y="97">slice 2</text>
<text x="755" y="160">slice 3</text></g>
<g class="mid small"><text x="275" y="108">keys and values,</text>
<text x="275" y="124">last hidden</text><text x="505" y="108">the same numbers,</text>
<text x="505" y="124">without a graph</text><text x="755" y="52">responses to prompt 1 or 2</text>
<text x="755" y="115">others</text><text x="755" y="178">the rest</text>
<text x="165" y="78">1. forward</text><text x="165" y="137">backward</text>
<text x="390" y="92">detach</text><text x="612" y="28">2. forward</text>
<text x="612" y="184">backward</text>
<text x="390" y="192">3. the sum of the slices' gradients</text></g>
<g class="flow"><path d="M122 85H206"/><path d="M342 99H436"/><path d="M572 80L656 32"/>
<path d="M572 95H656"/><path d="M572 110L656 155"/></g>
<g class="flow back c1"><path d="M658 46L576 90"/><path d="M658 107H576"/>
<path d="M658 172L576 122"/><path d="M505 144V172H275V146"/><path d="M208 119H124"/></g>
<text x="10" y="228">1. The prompts are computed once, for all responses to them.</text>
<text x="10" y="248">2. One slice at a time, forward and backward; then its graph is freed.</text>
<text x="10" y="268">3. When all slices are done, one backward pass through the prompts.</text>"""


def write(name, content):
    """Write a figure below the current folder, which is the repository's."""
    Path("paper/results/figures", name).write_text(FIGURE.format(name, SVG_STYLE, content))


def draw(tokenizer, tokens):
    """Return tokens in boxes from left to right, given the id, class and bar height of each."""
    x, out = 100, ""
    for id, kind, height in tokens:
        text = tokenizer.token_bytes(id).decode().translate({10: "⏎", 32: "·"})
        width = 4 + 7.3 * len(text)
        out += TOKEN.format(kind, x, width, height, text)
        x += width + 2
    return out


def main():
    run = train.parse("--recipe toy --seed 1 --device cpu".split())
    tokenizer = Tokenizer(run.model)
    corpus = load_corpus(run.corpus, tokenizer, run.holdout, run.seed, run.max_prompt)
    entropy = corpus_entropy(run, corpus)
    asked = select_positions(corpus, entropy, False, run.min_entropy, run.region)
    # The question of toy/step.md is number 3575, about document 4414. It is the 27th drawn there.
    group, advantages = sample(Policy(load_pretrained(run.model), tokenizer), run, (0, 26, 0),
                               asked[3575])
    rows, y = LEGEND, 8
    for completion, advantage in zip(group.completions, advantages):
        rows += RESPONSE.format(y, advantage, draw(tokenizer, [
            (id, "c0" if advantage > 0 else "c1", 0) for id in completion.ids]))  # none is 0
        y += 24
    story = [(corpus.tokens[n], "c1 chosen" if n in asked.places else "c9", 50 * max(0, entropy[n]))
             for n in range(*corpus.starts[4414:4416])]  # max(0, nan) is 0
    write("group.svg", rows)
    write("prompts.svg", PROMPTS)
    write("entropies.svg", SCALE.format(draw(tokenizer, story)))


if __name__ == "__main__":
    main()
