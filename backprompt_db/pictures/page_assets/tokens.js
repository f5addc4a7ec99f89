// A text as its tokens, the darker the less each was expected.

import { element } from "./elements.js";
import { counted, number } from "./words.js";

const DARKEST = 8; // nats: less than one in 2980
const STRONGEST = 0.75;

/** The text of a segment, token by token where these are known, then what is left of it. */
export function textOf(text, tokens) {
  const block = element("div", { class: "text", id: "text", tabindex: "0", dir: "auto" });
  if (!tokens?.pieces) {
    block.append(text);
    return block;
  }
  block.append(...spansOf(tokens, tokens.pieces));
  const shown = tokens.pieces.join("");
  if (text.startsWith(shown)) block.append(text.slice(shown.length));
  return block;
}

/** The tokens of which only ids are known. */
export function idsOf(tokens) {
  const spans = spansOf(tokens, tokens.ids.map(String));
  return element("div", { class: "text", id: "ids" }, ...spans.flatMap((span) => [span, " "]));
}

function spansOf({ ids, logprobs }, shown) {
  return shown.map((words, place) => tokenOf(words, ids[place], logprobs[place]));
}

function tokenOf(piece, id, logprob) {
  const token = element("span", { class: "token", title: titleOf(piece, id, logprob) }, piece);
  if (logprob === null) token.classList.add("undefined");
  else token.style.backgroundColor = `rgb(var(--unexpected) / ${(Math.min(-logprob / DARKEST, 1) * STRONGEST).toFixed(3)})`;
  return token;
}

function titleOf(piece, id, logprob) {
  const words = logprob === null ? "nothing predicts it" : `log-probability ${logprob.toFixed(3)}, ${number(100 * Math.exp(logprob))}%`;
  return `${JSON.stringify(piece)} · token ${id} · ${words}`;
}

/** What is to be said below it. */
export function remarkOn({ ids, logprobs }) {
  const known = logprobs.filter((logprob) => logprob !== null);
  if (!known.length) return `${counted(ids.length, "token")}, which nothing predicts`;
  const mean = known.reduce((sum, logprob) => sum + logprob, 0) / known.length;
  return `The darker a token, the less it was expected. Mean log-probability ${mean.toFixed(2)}, perplexity ${number(Math.exp(-mean))}.`;
}
