// Conversations as a file, and the search over them. Pure functions: they know no page.

const KIND = "am-memory conversations";
const ROLES = ["user", "assistant"];
const MAX_ID = 2 ** 31;  // far beyond it, the next id would be the same number

/** All conversations as the text of a file. */
export function exported(conversations) {
  return JSON.stringify({ kind: KIND, version: 1, conversations }, null, 1);
}

/**
 * The conversations in a file.
 *
 * Nothing in it is trusted: only known fields of the right types are taken. A conversation gets a new id, since the
 * server may remember another one under the old id.
 */
export function imported(text, newId) {
  let file = null;
  try {
    file = JSON.parse(text);
  } catch { /* the error below says it */ }
  if (file?.kind !== KIND || !Array.isArray(file.conversations)) throw new Error("This is not a file of exported conversations.");
  return file.conversations.map((given) => conversation(given, newId()));
}

function conversation(given, id) {
  const messages = (Array.isArray(given?.messages) ? given.messages : []).map(message);
  const known = new Set(messages.map((one) => one.id));
  const isWhole = known.size === messages.length && messages.every((one) => one.parent === null || (one.parent < one.id && known.has(one.parent)));
  if (!isWhole) throw new Error("A conversation in this file is damaged: its messages do not belong together.");
  const leaf = known.has(given?.leaf) ? given.leaf : messages.at(-1)?.id ?? null;
  const word = (name) => (["string", "number"].includes(typeof given?.[name]) ? String(given[name]) : "");
  return { id, title: word("title"), system: word("system"), temperature: word("temperature"), maxTokens: word("maxTokens"), updated: Number(given?.updated) || Date.now(), messages, next: Math.max(-1, ...known) + 1, leaf };
}

const text = (value) => (typeof value === "string" ? value : "");

function message(given) {
  const { id, parent, role, content, reasoning, note, model, isCut, files } = given ?? {};
  if (!Number.isInteger(id) || id < 0 || id > MAX_ID || !(parent === null || Number.isInteger(parent)) || !ROLES.includes(role) || typeof content !== "string") {
    throw new Error("A conversation in this file is damaged: it has a message without an id, a role or a text.");
  }
  const texts = Object.fromEntries(Object.entries({ reasoning, note, model }).filter(([, value]) => typeof value === "string"));
  const attached = (Array.isArray(files) ? files : []).map((file) => ({ name: text(file?.name), text: text(file?.text) }));
  return { id, parent, role, content, ...texts, ...(isCut === true ? { isCut } : {}), ...(attached.length ? { files: attached } : {}) };
}

/** One conversation as Markdown: the messages that are shown. */
export function asMarkdown(title, messages) {
  const said = messages.map(({ role, content }) => `## ${role === "user" ? "You" : "The model"}\n\n${content.trim()}\n`);
  return [`# ${title || "New conversation"}\n`, ...said].join("\n");
}

/** Whether a conversation has every word of a search in its title or in a message, in any case of letters. */
export function matches({ title, messages }, words) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  if (!wanted.length) return true;
  const texts = [title, ...messages.map(({ content }) => content)].map((text) => text.toLowerCase());
  return wanted.every((word) => texts.some((text) => text.includes(word)));
}
