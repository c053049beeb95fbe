// Looking into a conversation: the text of a segment, a search, and compacted tokens that become exact again.

import { matches } from "./archive.js";
import { count } from "./figures.js";

const byId = (id) => document.getElementById(id);
const SNIPPET_CHARS = 200, MAX_MESSAGES = 20;
const range = ({ start, end }) => `tokens ${count(start)} to ${count(end)}`;

export class Looking {
  #part = null;

  /**
   * @param page `api`; `id()` of the conversation; `isBusy()`: an answer is being written; `messages()` that are shown;
   *   `goTo(place)` shows one of them; `recalled(id, memory)` takes the memory after a recall.
   */
  constructor(page) {
    this.page = page;
    byId("look").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#search(byId("look-query").value.trim());
    });
    byId("part-recall").addEventListener("click", () => this.#recall(this.#part, "part-said"));
    byId("part-close").addEventListener("click", () => { byId("part").hidden = true; });
  }

  /** Another conversation is shown. */
  clear() {
    this.#part = null;
    byId("part").hidden = true;
    byId("look-query").value = "";
    this.#found([], "");
  }

  /** Show the text of a segment. It is data, never markup. */
  async open(part) {
    const { page } = this, id = page.id();
    this.#part = part;
    byId("part").hidden = false;
    byId("part-recall").hidden = part.kind !== "compacted";
    byId("part-title").textContent = `${range(part)}, ${part.kind}`;
    byId("part-text").textContent = part.text || "…";
    byId("part-said").textContent = "";
    const isShown = () => this.#part === part && page.id() === id;
    try {
      const { text, end } = await page.api.text(id, part);
      if (!isShown()) return;
      byId("part-text").textContent = end < part.end ? `${text} …` : text;
      if (end < part.end) byId("part-said").textContent = `The first ${count(end - part.start)} tokens are shown.`;
    } catch (error) {
      if (isShown()) byId("part-said").textContent = error.message;
    }
  }

  /** Find words in the messages, and what a question is about in the compacted part. */
  async #search(query) {
    const { page } = this, id = page.id();
    if (!query) { this.#found([], ""); return; }
    const found = page.messages()
      .map((message, place) => ({ message, place }))
      .filter(({ message }) => matches({ title: "", messages: [message] }, query))
      .map(({ message, place }) => this.#message(message, place, query));
    const inMessages = `${found.length} of the messages ${found.length === 1 ? "has" : "have"} these words`;
    const shown = found.slice(0, MAX_MESSAGES);
    if (page.isBusy()) { this.#found(shown, `${inMessages}; the memory can be searched when the answer is complete.`); return; }
    this.#found(shown, `${inMessages}; searching the memory…`);
    const spans = await page.api.search(id, query).catch((error) => (error.status === 404 ? [] : error));
    if (page.id() !== id) return;
    if (spans instanceof Error) this.#found(shown, `${inMessages}. ${spans.message}`);
    else this.#found([...spans.map((span) => this.#span(span)), ...shown], `${inMessages}; the memory found ${spans.length} ${spans.length === 1 ? "place" : "places"} in the compacted part.`);
  }

  #found(items, said) {
    byId("look-said").textContent = said;
    byId("look-found").replaceChildren(...items);
  }

  #message({ role, content }, place, query) {
    const at = Math.max(content.toLowerCase().indexOf(query.toLowerCase().split(/\s+/)[0]) - SNIPPET_CHARS / 4, 0);
    const snippet = `${at ? "…" : ""}${content.slice(at, at + SNIPPET_CHARS)}${content.length > at + SNIPPET_CHARS ? "…" : ""}`;
    return item(snippet, role === "user" ? "Show your message" : "Show the answer", () => this.page.goTo(place));
  }

  #span(span) {
    const made = span.mount
      ? item(`${span.text} (${span.mount})`)
      : item(span.text, `Make ${range(span)} exact`, () => this.#recall(span, "look-said"));
    made.className = "from-memory";
    return made;
  }

  /** Make a span exact, and say so in a line of the page. */
  async #recall(span, line) {
    const { page } = this, id = page.id();
    const say = (text) => { if (page.id() === id) byId(line).textContent = text; };
    if (page.isBusy()) { say("Wait until the answer is complete."); return; }
    say(`Making ${range(span)} exact…`);
    try {
      page.recalled(id, await page.api.recall(id, span));
      say(`${range(span)} are exact for the next answer, until others need the room.`);
    } catch (error) {
      say(error.message);
    }
  }
}

/** A text of a conversation, with a button. */
function item(text, label = "", action = null) {
  const made = document.createElement("li"), words = document.createElement("p");
  words.textContent = text;
  made.append(words);
  if (action) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.addEventListener("click", action);
    made.append(button);
  }
  return made;
}
