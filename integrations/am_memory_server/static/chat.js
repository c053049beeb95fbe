// The messages of the conversation, the answer that is being streamed, and the buttons of each message.

import { render } from "./markdown.js";

const byId = (id) => document.getElementById(id);

export class ChatView {
  #actions;
  #frame = 0;

  /** @param actions callbacks of a message's buttons: copy, retry, fork. */
  constructor(actions) {
    this.#actions = actions;
    this.scroll = byId("scroll");
    this.list = byId("messages");
    this.scroll.addEventListener("scroll", () => { byId("jump").hidden = this.#isAtEnd(); });
    byId("jump").addEventListener("click", () => this.toEnd());
  }

  show(conversation) {
    this.list.replaceChildren();
    conversation.messages.forEach((message, index) => this.add(message, index));
    byId("welcome").hidden = conversation.messages.length > 0;
    this.toEnd();
  }

  /** Add one message; returns its node. */
  add(message, index) {
    byId("welcome").hidden = true;
    const node = make("article", `message ${message.role}`);
    node.append(Object.assign(make("span", "sr"), { textContent: message.role === "user" ? "You said:" : "The model said:" }));
    node.append(make("div", "body"), make("div", "tools"));
    this.list.append(node);
    this.#write(node, message);
    this.#tools(node, message, index);
    this.lookedUp(node, message);
    return node;
  }

  /** Update the text of a node, at most once per frame. */
  update(node, message) {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.finish(node, message));
  }

  /** Set the final text of a node, at once: the next answer's frame would replace this one's. */
  finish(node, message) {
    cancelAnimationFrame(this.#frame);
    this.#stayingAtEnd(() => this.#write(node, message));
  }

  #write(node, message) {
    const body = node.querySelector(".body");
    if (message.role === "user") body.textContent = message.content;
    else body.replaceChildren(render(message.content));
    node.querySelector(".note")?.remove();
    if (message.note) node.querySelector(".tools").before(Object.assign(make("div", "note"), { textContent: message.note }));
  }

  /** Under an answer, a line that opens to the texts that were looked up for it. They are data, never markup. */
  lookedUp(node, { lookedUp: spans = [] }) {
    if (!spans.length) return;
    const box = node.querySelector(".looked-up") ?? make("details", "looked-up"), list = make("ul", "");
    list.append(...spans.map((span) => Object.assign(make("li", ""), { textContent: span.text, title: `tokens ${span.start.toLocaleString("en")} to ${span.end.toLocaleString("en")}` })));
    box.replaceChildren(Object.assign(make("summary", ""), { textContent: `looked up: ${spans.length} ${spans.length === 1 ? "place" : "places"}` }), list);
    this.#stayingAtEnd(() => node.querySelector(".tools").before(box));
  }

  #tools(node, message, index) {
    const tools = node.querySelector(".tools");
    const offer = (text, action) => {
      const button = make("button", "");
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => action(index, button));
      tools.append(button);
    };
    offer("Copy", this.#actions.copy);
    if (message.role === "assistant") {
      offer("Retry", this.#actions.retry);
      offer("Fork", this.#actions.fork);
    }
  }

  setWriting(node, isWriting) {
    node.classList.toggle("writing", isWriting);
    this.list.setAttribute("aria-busy", String(isWriting));
  }

  /** Draw a line before an answer during which memory was compacted: one line for all its compactions. */
  mark(numTokens, before) {
    const isMore = before.previousSibling?.className === "mark";
    const node = isMore ? before.previousSibling : make("div", "mark");
    node.dataset.tokens = Number(node.dataset.tokens ?? 0) + numTokens;
    node.dataset.count = Number(node.dataset.count ?? 0) + 1;
    const times = node.dataset.count === "1" ? "" : ` in ${node.dataset.count} compactions`;
    node.textContent = `${Number(node.dataset.tokens).toLocaleString("en")} tokens compacted${times}`;
    this.#stayingAtEnd(() => this.list.insertBefore(node, before));
  }

  fail(text) {
    const node = make("div", "failure");
    node.setAttribute("role", "alert");
    node.textContent = text;
    this.list.append(node);
    this.toEnd();
  }

  toEnd() {
    this.scroll.scrollTop = this.scroll.scrollHeight;
  }

  /** Make a change, and go to the new end if the old one was in view. */
  #stayingAtEnd(change) {
    const isAtEnd = this.#isAtEnd();
    change();
    if (isAtEnd) this.toEnd();
  }

  #isAtEnd() {
    return this.scroll.scrollHeight - this.scroll.scrollTop - this.scroll.clientHeight < 80;
  }
}

function make(name, className) {
  return Object.assign(document.createElement(name), { className });
}
