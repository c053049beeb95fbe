// Conversations and settings in the browser's database; without a database they last as long as the page.

const STORE = "conversations";

/** The browser keeps no more: its room for this page is used up. */
export class NoRoom extends Error {
  constructor() {
    super("The browser has no room left for this page: export conversations, delete some, and try again.");
  }
}

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export class ConversationStore {
  #database = null;
  #fallback = new Map();

  async open() {
    try {
      const request = indexedDB.open("am-memory", 2);
      request.onupgradeneeded = () => {
        const { result: database } = request;
        if (database.objectStoreNames.contains(STORE)) database.deleteObjectStore(STORE);  // lists, not trees
        database.createObjectStore(STORE, { keyPath: "id" });
      };
      this.#database = await finished(request);
    } catch {
      this.#database = null;
    }
    return this;
  }

  #store(mode) {
    return this.#database.transaction(STORE, mode).objectStore(STORE);
  }

  /** All conversations, the most recently used first. */
  async all() {
    const found = this.#database ? await finished(this.#store("readonly").getAll()) : [...this.#fallback.values()];
    return found.sort((one, other) => other.updated - one.updated);
  }

  /** Keep conversations: all of them, or none if one does not fit. */
  async put(...conversations) {
    const copies = structuredClone(conversations);
    if (!this.#database) copies.forEach((copy) => this.#fallback.set(copy.id, copy));
    else await this.#written((store) => copies.forEach((copy) => store.put(copy)));
  }

  async remove(id) {
    if (!this.#database) this.#fallback.delete(id);
    else await this.#written((store) => store.delete(id));
  }

  /** Make changes in one transaction; it may fail after each of them has succeeded. */
  #written(change) {
    const store = this.#store("readwrite"), { transaction } = store;
    return new Promise((resolve, reject) => {
      transaction.oncomplete = () => resolve();
      transaction.onabort = () => reject(transaction.error?.name === "QuotaExceededError" ? new NoRoom() : new Error("The browser did not keep it."));
      change(store);
    });
  }
}

const SETTINGS = "am-memory.settings", DRAFTS = "am-memory.drafts";

function load(name) {
  try {
    return JSON.parse(localStorage.getItem(name) ?? "{}");
  } catch {
    return {};
  }
}

function save(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch { /* no storage: it lasts as long as the page */ }
}

export function loadSettings() {
  return { key: "", theme: "", temperature: "", maxTokens: "", current: "", ...load(SETTINGS) };
}

export function saveSettings(settings) {
  save(SETTINGS, settings);
}

/** What was typed and not sent yet, by conversation. */
export function draftOf(id) {
  return load(DRAFTS)[id] ?? "";
}

export function saveDraft(id, text) {
  const { [id]: _, ...others } = load(DRAFTS);
  save(DRAFTS, text ? { ...others, [id]: text } : others);
}
