// A text as its tokens, the stronger in colour the less each was expected.

import { element } from "./elements.js";
import { counted, number } from "./words.js";

const MOST_NATS = 8; // nats: less than one in 2980
const STRONGEST = 0.75;
const MOST_NAMES = 4; // of start tokens

/** The text of a segment, token by token where these are known, then what is left of it. */
export function textOf(text, tokens) {
  const block = element("div", { class: "text", id: "text", tabindex: "0", dir: "auto" });
  if (!tokens?.pieces) {
    block.append(text);
    return block;
  }
  block.append(...spansOf(tokens, tokens.pieces), restOf(text, tokens.pieces));
  return block;
}

/** What of a text is left after its tokens; the names of start tokens, which stand before it, are no part of it. */
function restOf(text, pieces) {
  for (let numNames = 0; numNames <= Math.min(MOST_NAMES, pieces.length); numNames++) {
    const shown = pieces.slice(numNames).join("");
    if (text.startsWith(shown)) return text.slice(shown.length);
  }
  return "";
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
  else token.style.backgroundColor = `rgb(var(--unexpected) / ${(Math.min(-logprob / MOST_NATS, 1) * STRONGEST).toFixed(3)})`;
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
  return `The stronger a token's colour, the less it was expected. Mean log-probability ${mean.toFixed(2)}, perplexity ${number(Math.exp(-mean))}.`;
}
