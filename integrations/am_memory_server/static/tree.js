// One conversation: a tree of messages of which one path is shown. Pure functions: they know no page and no server.
//
// A message that is edited, or answered again, gets a sibling. `leaf` is the last message of the path that is shown.

const FENCE = "```";

export function fresh(id, { system = "", temperature = "", maxTokens = "" } = {}) {
  return { id, title: "", system, temperature, maxTokens, updated: Date.now(), messages: [], next: 0, leaf: null };
}

const find = (conversation, id) => conversation.messages.find((message) => message.id === id) ?? null;
const children = (conversation, id) => conversation.messages.filter((message) => message.parent === id);

/** The messages that are shown, oldest first. */
export function path(conversation) {
  const found = [];
  for (let message = find(conversation, conversation.leaf); message; message = find(conversation, message.parent)) found.unshift(message);
  return found;
}

/** Add a message behind another one (null: at the beginning), and show it. */
export function add(conversation, parent, fields) {
  const message = { id: conversation.next, parent: parent?.id ?? null, ...fields };
  conversation.next += 1;
  conversation.messages.push(message);
  conversation.leaf = message.id;
  return message;
}

/** Take away a message that nothing follows, and show what came before it. */
export function remove(conversation, message) {
  conversation.messages = conversation.messages.filter((other) => other !== message);
  const others = children(conversation, message.parent);
  if (others.length) choose(conversation, others.at(-1));
  else conversation.leaf = message.parent;
}

/** A message and its variants, in the order in which they were made. */
export function variants(conversation, message) {
  return children(conversation, message.parent);
}

/** Show a variant, with the newest messages behind it. */
export function choose(conversation, message) {
  let last = message;
  for (let next; (next = children(conversation, last.id).at(-1)); ) last = next;
  conversation.leaf = last.id;
}

/** The messages up to one of them, as a conversation of its own. */
export function forked(conversation, message, id) {
  const branch = { ...structuredClone(conversation), id, title: `${conversation.title} (fork)`, updated: Date.now(), leaf: message.id };
  branch.messages = path(branch);
  return branch;
}

/** The text of a message as the model gets it: attached texts come first, each between fences that it does not contain. */
export function sentText({ content, files = [] }) {
  const attached = files.map(({ name, text }) => {
    let fence = FENCE;
    while (text.includes(fence)) fence += "`";
    return `${name}:\n${fence}\n${text}\n${fence}`;
  });
  return [...attached, content].filter(Boolean).join("\n\n");
}

/** The body of a request for the answer to these messages. If the last of them is an answer, it goes on. */
export function requestBody(conversation, messages) {
  const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  const set = (name, value) => (value === "" ? {} : { [name]: Number(value) });
  return {
    messages: [...system, ...messages.map((message) => ({ role: message.role, content: sentText(message) }))],
    stream: true,
    stream_options: { include_memory: true },
    metadata: { conversation_id: conversation.id },
    ...set("temperature", conversation.temperature),
    ...set("max_tokens", conversation.maxTokens),
    ...(messages.at(-1)?.role === "assistant" ? { continue_final_message: true } : {}),
  };
}
