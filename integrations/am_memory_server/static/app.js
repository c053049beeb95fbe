// The page: connects conversations, settings and the answer that is being streamed.

import { Api } from "./api.js";
import { ChatView } from "./chat.js";
import { MemoryView } from "./memory.js";
import { ConversationStore, loadSettings, saveSettings } from "./store.js";

const byId = (id) => document.getElementById(id);
const STARTERS = ["Tell me a long story about a lighthouse", "Explain how a bicycle stays upright", "Plan a week of simple dinners"];
const MAX_TITLE = 60, SAVE_EVERY_MS = 2000;

const api = new Api(), memory = new MemoryView(), store = await new ConversationStore().open();
const settings = loadSettings();
const chat = new ChatView({ copy, retry, fork });
let conversations = await store.all();
let current = null, running = null;

function fresh() {
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random().toString(36).slice(2)}`, title: "", system: "", updated: Date.now(), messages: [] };
}

// Conversations

async function open(conversation) {
  running?.abort();
  current = conversation;
  settings.current = conversation.id;
  saveSettings(settings);
  chat.show(conversation);
  list();
  document.querySelector(".app").classList.remove("show-side");
  veil();
  await look();
}

function list() {
  byId("title").textContent = current.title || "New conversation";
  byId("conversations").replaceChildren(...conversations.map((conversation) => {
    const item = document.createElement("li"), button = document.createElement("button"), remove = document.createElement("button");
    button.className = "open";
    button.textContent = conversation.title || "New conversation";
    button.addEventListener("click", () => open(conversation));
    if (conversation.id === current.id) {
      item.className = "current";
      button.setAttribute("aria-current", "true");
    }
    remove.className = "icon remove";
    remove.setAttribute("aria-label", `Delete ${button.textContent}`);
    remove.append(icon("trash"));
    remove.addEventListener("click", () => forget(conversation));
    item.append(button, remove);
    return item;
  }));
}

async function forget(conversation) {
  if (!confirm(`Delete "${conversation.title || "New conversation"}", here and in the server's memory?`)) return;
  if (conversation.id === current.id) running?.abort();
  conversations = conversations.filter((other) => other.id !== conversation.id);
  await store.remove(conversation.id);
  await api.forget(conversation.id).catch((error) => chat.fail(error.message));
  if (conversation.id === current.id) await open(conversations[0] ?? fresh());
  else list();
}

async function keep(conversation) {
  conversation.updated = Date.now();
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  conversations.sort((one, other) => other.updated - one.updated);
  await store.put(conversation);
}

/** Show the server's memory of the current conversation. */
async function look() {
  const { id } = current;
  const found = !current.messages.length ? null : await api.memory(id).catch((error) => {
    if (error.status === 401) askForKey();
    return null;
  });
  if (current.id === id && !running) {
    memory.show(found);
    memory.say("");
  }
}

// Answers

async function send(text) {
  const content = text.trim();
  if (!content || running) return;
  current.messages.push({ role: "user", content });
  current.title ||= content.slice(0, MAX_TITLE).replace(/\s+/g, " ");
  chat.add(current.messages.at(-1), current.messages.length - 1);
  chat.toEnd();
  await keep(current);
  list();
  await answer();
}

/** Stream the answer to the last message. */
async function answer() {
  const conversation = current, message = { role: "assistant", content: "" };
  const asked = [...(conversation.system ? [{ role: "system", content: conversation.system }] : []), ...conversation.messages.map(({ role, content }) => ({ role, content }))];
  conversation.messages.push(message);
  const node = chat.add(message, conversation.messages.length - 1);
  running = new AbortController();
  const { signal } = running;
  writing(node, true);
  const saving = setInterval(() => { if (message.content) keep(conversation); }, SAVE_EVERY_MS);
  try {
    for await (const chunk of api.chat(requestBody(conversation, asked), signal)) {
      if (chunk.am_memory) remember(chunk.am_memory, message, node);
      const delta = chunk.choices[0]?.delta?.content;
      if (delta) {
        message.content += delta;
        chat.update(node, message);
      }
      if (chunk.choices[0]?.finish_reason === "length") message.note = "cut off at the longest answer allowed";
    }
    if (!message.content) message.note = "the model ended without a word";
    say("The answer is complete.");
  } catch (error) {
    if (signal.aborted) {
      message.note = "stopped";
      say("Stopped.");
    } else {
      if (error.status === 401) askForKey();
      if (current === conversation) chat.fail(error.message);
    }
    if (!message.content) conversation.messages.splice(conversation.messages.indexOf(message), 1);
  } finally {
    clearInterval(saving);
    running = null;
    writing(node, false);
    if (current === conversation) {
      if (conversation.messages.includes(message)) chat.finish(node, message);
      else node.remove();
      memory.say("");
    }
    await keep(conversation);
    list();
  }
}

function requestBody(conversation, messages) {
  return {
    messages,
    stream: true,
    stream_options: { include_memory: true },
    metadata: { conversation_id: conversation.id },
    ...(settings.temperature === "" ? {} : { temperature: Number(settings.temperature) }),
    ...(settings.maxTokens === "" ? {} : { max_tokens: Number(settings.maxTokens) }),
  };
}

function remember(update, message, node) {
  if (update.stats) memory.resize(update.stats, update);
  if (update.memory) memory.show(update.memory);
  switch (update.event) {
    case "reading":
      if (update.left_tokens) memory.say(`reading, ${update.left_tokens.toLocaleString("en")} tokens left`, true);
      else memory.say("answering");
      break;
    case "compacting":
      memory.say(`compacting ${update.start.toLocaleString("en")}–${update.end.toLocaleString("en")}`, true);
      say("Compacting the oldest part of the memory.");
      break;
    case "compacted":
      memory.say("answering");
      chat.mark(update.report.end - update.report.start, node);
      break;
    case "looked_up":
      message.lookedUp = [...(message.lookedUp ?? []).filter((old) => !update.spans.some(({ start, end }) => old.start === start && old.end === end)), ...update.spans];
      chat.lookedUp(node, message);
      break;
    case "rebuilt":
      memory.say(`reading ${update.num_tokens.toLocaleString("en")} tokens again`, true);
      break;
  }
}

function writing(node, isWriting) {
  chat.setWriting(node, isWriting);
  byId("send").hidden = isWriting;
  byId("stop").hidden = !isWriting;
  byId("compact").disabled = isWriting;
  if (isWriting) memory.say("waiting for the model", true);
}

async function retry(index) {
  if (running) return;
  current.messages.length = index;
  chat.show(current);
  await answer();
}

async function fork(index) {
  const branch = { ...fresh(), system: current.system, title: `${current.title} (fork)`, messages: structuredClone(current.messages.slice(0, index + 1)) };
  await keep(branch);
  const failed = await api.fork(current.id, branch.id).catch((error) => error);
  await open(branch);
  if (failed) chat.fail(failed.message);
}

async function copy(index, button) {
  await navigator.clipboard?.writeText(current.messages[index].content);
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// The layout

function say(text) {
  byId("status").textContent = text;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

function veil() {
  const { classList } = document.querySelector(".app");
  byId("veil").hidden = !classList.contains("show-side") && !classList.contains("show-memory");
}

function drawer(name, isOpen, focus) {
  document.querySelector(".app").classList.toggle(name, isOpen);
  veil();
  byId(focus).focus();
}

function grow() {
  const input = byId("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function applyTheme() {
  const isDark = settings.theme ? settings.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
}

function askForKey() {
  openSettings();
  byId("set-key").focus();
}

function openSettings() {
  byId("set-key").value = settings.key;
  byId("set-system").value = current.system;
  byId("set-temperature").value = settings.temperature;
  byId("set-max").value = settings.maxTokens;
  byId("set-theme").value = settings.theme;
  if (!byId("settings").open) byId("settings").showModal();
}

async function closeSettings() {
  if (byId("settings").returnValue !== "save") return;
  Object.assign(settings, { key: byId("set-key").value.trim(), temperature: byId("set-temperature").value, maxTokens: byId("set-max").value, theme: byId("set-theme").value });
  saveSettings(settings);
  api.key = settings.key;
  applyTheme();
  if (current.system !== byId("set-system").value.trim()) {
    current.system = byId("set-system").value.trim();
    if (current.messages.length) await keep(current);
  }
  await connect();
}

async function connect() {
  try {
    byId("model").textContent = await api.model();
    await look();
  } catch (error) {
    byId("model").textContent = "not connected";
    if (error.status === 401) askForKey();
    else chat.fail(error.message);
  }
}

function listen() {
  const wide = matchMedia("(min-width: 1121px)");
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    const text = byId("input").value;
    byId("input").value = "";
    grow();
    send(text);
  });
  byId("input").addEventListener("input", grow);
  byId("input").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  });
  byId("stop").addEventListener("click", () => { running?.abort(); byId("input").focus(); });
  byId("new").addEventListener("click", () => { open(fresh()); byId("input").focus(); });
  byId("open-side").addEventListener("click", () => drawer("show-side", true, "close-side"));
  byId("close-side").addEventListener("click", () => drawer("show-side", false, "open-side"));
  byId("close-memory").addEventListener("click", () => drawer("show-memory", false, "toggle-memory"));
  byId("toggle-memory").addEventListener("click", () => {
    if (!wide.matches) { drawer("show-memory", true, "close-memory"); return; }
    const isHidden = document.querySelector(".app").classList.toggle("no-memory");
    byId("toggle-memory").setAttribute("aria-expanded", String(!isHidden));
  });
  byId("veil").addEventListener("click", () => { document.querySelector(".app").classList.remove("show-side", "show-memory"); veil(); });
  byId("open-settings").addEventListener("click", openSettings);
  byId("settings").addEventListener("close", closeSettings);
  byId("compact").addEventListener("click", async () => {
    memory.say("compacting", true);
    await api.compact(current.id).catch((error) => chat.fail(error.message));
    await look();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || byId("settings").open) return;
    if (document.querySelector(".app").matches(".show-side, .show-memory")) byId("veil").click();
    else running?.abort();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);
  addEventListener("pagehide", () => { if (running) store.put(current); });
  byId("starters").append(...STARTERS.map((text) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.textContent = text;
    button.addEventListener("click", () => send(text));
    item.append(button);
    return item;
  }));
}

api.key = settings.key;
applyTheme();
listen();
await open(conversations.find(({ id }) => id === settings.current) ?? conversations[0] ?? fresh());
await connect();
byId("input").focus();
