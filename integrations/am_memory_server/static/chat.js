// The messages of the conversation, the answer that is being streamed, and the buttons of each message.

import { render } from "./markdown.js";
import { paint } from "./painting.js";

const byId = (id) => document.getElementById(id);
const FRAME_MS = 16;

export class ChatView {
  #actions;
  #timer = 0;
  #restUntil = 0;

  /** @param actions callbacks of a message's buttons: copy, retry, fork, continue, edit, choose. */
  constructor(actions) {
    this.#actions = actions;
    this.scroll = byId("scroll");
    this.list = byId("messages");
    this.scroll.addEventListener("scroll", () => { byId("jump").hidden = this.#isAtEnd(); });
    byId("jump").addEventListener("click", () => this.toEnd());
  }

  /** Show messages; `variantsOf(message)` gives each one's variants. */
  show(messages, variantsOf) {
    this.list.replaceChildren();
    messages.forEach((message) => this.add(message, variantsOf(message)));
    byId("welcome").hidden = messages.length > 0;
    this.toEnd();
  }

  /** Add one message; returns its node. */
  add(message, variants = [message]) {
    byId("welcome").hidden = true;
    const node = make("article", `message ${message.role}`);
    node.append(make("span", "sr", message.role === "user" ? "You said:" : "The model said:"));
    node.append(make("div", "body"), make("div", "tools"));
    this.list.append(node);
    this.#write(node, message);
    this.#tools(node, message, variants);
    this.lookedUp(node, message);
    this.#paint(node);
    return node;
  }

  /** Update the text of a node, at most once per frame. A long text is drawn less often, in a quarter of the time. */
  update(node, message) {
    if (this.#timer) return;
    this.#timer = setTimeout(() => this.#flush(node, message), Math.max(FRAME_MS, this.#restUntil - performance.now()));
  }

  /** Set the text of a node, at once. */
  #flush(node, message) {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const began = performance.now();
    this.#stayingAtEnd(() => this.#write(node, message));
    const ended = performance.now();
    this.#restUntil = ended + 3 * (ended - began);
  }

  /** Set the final text of a node, and its buttons. */
  finish(node, message, variants) {
    node.querySelector(".tools").replaceChildren();
    this.#tools(node, message, variants);
    this.#flush(node, message);
    this.#paint(node);
  }

  #paint(node) {
    paint(node.querySelector(".body")).then(() => this.#stayingAtEnd(() => {}), () => {});  // without a library: as text
  }

  #write(node, message) {
    const body = node.querySelector(".body");
    if (message.role === "user") body.replaceChildren(...filesOf(message), message.content);
    else body.replaceChildren(render(message.content));
    this.#think(node, message);
    node.querySelector(".note")?.remove();
    if (message.note) node.querySelector(".tools").before(make("div", "note", message.note));
  }

  /** The reasoning, folded above the answer. It opens by itself as long as there is nothing else to see. */
  #think(node, { reasoning, content }) {
    if (!reasoning) return;
    let box = node.querySelector(".thinking");
    if (!box) {
      box = make("details", "thinking");
      box.append(make("summary", ""), make("div", "thoughts"));
      node.querySelector(".body").before(box);
    }
    const summary = content ? "Reasoning" : "Thinking";
    if (box.firstChild.textContent !== summary) box.open = !content;
    box.firstChild.textContent = summary;
    box.lastChild.textContent = reasoning;
  }

  /** What an answer waits for, in the place where it will stand; "": nothing any more. */
  waiting(node, text) {
    this.#stayingAtEnd(() => {
      node.querySelector(".waiting")?.remove();
      if (text) node.querySelector(".body").after(make("div", "waiting", text));
    });
  }

  /** Under an answer, a line that opens to the texts that were looked up for it. They are data, never markup. */
  lookedUp(node, { lookedUp: spans = [] }) {
    if (!spans.length) return;
    const box = node.querySelector(".looked-up") ?? make("details", "looked-up"), list = make("ul", "");
    list.append(...spans.map((span) => Object.assign(make("li", "", span.text), { title: `tokens ${span.start.toLocaleString("en")} to ${span.end.toLocaleString("en")}` })));
    box.replaceChildren(make("summary", "", `looked up: ${spans.length} ${spans.length === 1 ? "place" : "places"}`), list);
    this.#stayingAtEnd(() => node.querySelector(".tools").before(box));
  }

  #tools(node, message, variants) {
    const tools = node.querySelector(".tools");
    const offer = (text, action, label = null) => {
      const button = make("button", "", text);
      button.type = "button";
      if (label) button.setAttribute("aria-label", label);
      button.addEventListener("click", () => action(message, button));
      tools.append(button);
      return button;
    };
    offer("Copy", this.#actions.copy);
    if (message.role === "assistant") {
      offer("Retry", this.#actions.retry);
      offer("Fork", this.#actions.fork);
      if (message.isCut) offer("Continue", this.#actions.continue);
    } else {
      offer("Edit", () => this.#edit(node, message));
    }
    if (variants.length > 1) {
      const place = variants.indexOf(message), turn = (step) => this.#actions.choose(variants[place + step]);
      offer("‹", () => turn(-1), "Show the variant before").disabled = place === 0;
      tools.append(make("span", "place", `${place + 1} of ${variants.length}`));
      offer("›", () => turn(1), "Show the next variant").disabled = place === variants.length - 1;
    }
    if (message.model) tools.append(make("span", "place", message.model));
  }

  /** Put a box in the place of a message, to send it again with another text. */
  #edit(node, message) {
    if (node.querySelector("form")) return;
    const form = make("form", "edit"), box = make("textarea", ""), cancel = make("button", "plain", "Cancel"), submit = make("button", "primary", "Send");
    box.value = message.content;
    box.rows = Math.min(12, message.content.split("\n").length + 1);
    box.setAttribute("aria-label", "The new text of the message");
    cancel.type = "button";
    const close = () => {
      form.remove();
      node.querySelector(".body").hidden = false;
    };
    cancel.addEventListener("click", close);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (box.value.trim() && this.#actions.edit(message, box.value.trim())) close();
    });
    form.append(box, cancel, submit);
    node.querySelector(".body").hidden = true;
    node.querySelector(".body").after(form);
    box.focus();
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

  /** Bring a message into view, by its place in the list. */
  goTo(place) {
    const node = this.list.querySelectorAll(".message")[place];
    node.tabIndex = -1;
    node.scrollIntoView({ block: "start" });
    node.focus({ preventScroll: true });
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

function make(name, className, text = "") {
  return Object.assign(document.createElement(name), { className, textContent: text });
}

/** A line for each attached text. */
function filesOf({ files = [] }) {
  return files.map((file) => {
    const box = make("details", "file");
    box.append(make("summary", "", file.name), make("pre", "", file.text));
    return box;
  });
}
