// The list of conversations, and the search over it.

import { matches } from "./archive.js";
import { icon } from "./icons.js";

const byId = (id) => document.getElementById(id);

export class Sidebar {
  #conversations = [];
  #current = null;

  /** @param actions `open(conversation)` and `forget(conversation)`. */
  constructor(actions) {
    this.actions = actions;
    byId("search").addEventListener("input", () => this.#draw());
  }

  show(conversations, current) {
    this.#conversations = conversations;
    this.#current = current;
    this.#draw();
  }

  #draw() {
    const words = byId("search").value;
    const found = this.#conversations.filter((conversation) => matches(conversation, words));
    byId("conversations").replaceChildren(...found.map((conversation) => this.#item(conversation)));
    byId("found").textContent = words.trim() ? `${found.length} of ${this.#conversations.length} conversations` : "";
  }

  #item(conversation) {
    const item = document.createElement("li"), button = document.createElement("button"), remove = document.createElement("button");
    button.className = "open";
    button.textContent = conversation.title || "New conversation";
    button.addEventListener("click", () => this.actions.open(conversation));
    if (conversation === this.#current) {
      item.className = "current";
      button.setAttribute("aria-current", "true");
    }
    remove.className = "icon remove";
    remove.setAttribute("aria-label", `Delete ${button.textContent}`);
    remove.append(icon("trash"));
    remove.addEventListener("click", () => this.actions.forget(conversation));
    item.append(button, remove);
    return item;
  }
}
