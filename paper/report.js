"use strict";
const KINDS = ["right", "wrong", "unparsable"], PAGE = 8, $ = id => document.getElementById(id);
const questions = JSON.parse($("data").textContent);
const steps = [...new Set(questions.map(q => q.step))];
let wanted = -1, found = [], drawn = 0;

function fixed(x) {
  return x === null ? "unknown" : String(+x.toFixed(2)).replace("-", "\u2212");
}

function make(tag, kind, ...children) {
  const node = document.createElement(tag);
  node.className = kind;
  // control characters are drawn as pictures; the last two ranges would turn text around
  const control = /[\0-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]/g;
  const picture = c => c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : "\ufffd";
  const shown = child => typeof child === "string" ? child.replace(control, picture) : child;
  node.append(...children.map(shown));
  return node;
}

function response([kind, text, reward, prediction, advantage, finished, tokens]) {
  const parts = [], thought = text.lastIndexOf("</think>");
  const box = prediction === null ? -1 : text.lastIndexOf("\\boxed{" + prediction + "}") + 7;
  let at = 0;
  if (thought >= 0) {
    at = thought + 8;
    parts.push(text.slice(0, thought), make("span", "tag", text.slice(thought, at)));
  }
  if (box > at + 6) {
    parts.push(text.slice(at, box));
    at = box + prediction.length;
    parts.push(make("mark", "", text.slice(box, at)));
  }
  parts.push(text.slice(at), text ? "" : make("span", "tag", "(empty)"));
  const facts = ["reward " + fixed(reward), "advantage " + fixed(advantage), tokens + " tokens"];
  const line = make("div", "facts", make("b", "", KINDS[kind]));
  line.append(...facts.map(fact => make("span", "", fact)));
  if (!finished) line.append(make("b", "", "not finished"));
  return make("div", "response " + KINDS[kind], line, make("div", "text", ...parts));
}

function card(q) {
  const chosen = q.responses.filter(r => wanted < 0 || r[0] === wanted);
  const right = q.responses.filter(r => r[0] === 0).length;
  const shown = chosen.length < q.responses.length ? `, ${chosen.length} shown` : "";
  const truth = make("span", "truth", q.truth);
  return make("article", "card question",
    make("div", "quiet", `${q.about}: ${right} of ${q.responses.length} right${shown}`),
    make("div", "text context", q.context, make("span", "caret"), truth),
    make("div", "responses", ...chosen.map(response)));
}

function more() {
  $("questions").append(...found.slice(drawn, drawn += PAGE).map(card));
  $("more").hidden = drawn >= found.length;
}

function show() {
  const at = $("step").selectedIndex;
  const here = questions.filter(q => !at || q.step === steps[at - 1]);
  const kinds = here.flatMap(q => q.responses.map(r => r[0]));
  found = here.filter(q => wanted < 0 || q.responses.some(r => r[0] === wanted));
  for (const button of document.querySelectorAll(".tools button")) {
    const kind = +button.value, count = kinds.filter(k => kind < 0 || k === kind).length;
    button.textContent = `${kind < 0 ? "all" : KINDS[kind]} ${count.toLocaleString("en")}`;
    button.setAttribute("aria-pressed", String(kind === wanted));
    button.onclick = () => { wanted = kind; show(); };
  }
  $("questions").replaceChildren(found.length ? "" : "None here.");
  drawn = 0;
  more();
}

for (const step of steps) $("step").append(new Option("step " + step));
$("step").onchange = show;
$("more").onclick = more;
$("browser").hidden = false;
show();
