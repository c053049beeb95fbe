// Markdown to DOM nodes. Text becomes text nodes only, so that no model output can become markup or run.
//
// Every pattern takes a time that is proportional to the text, also where a mark is opened ten thousand times and never
// closed: what lies between two marks contains no other opening one.

const SAFE_LINK = /^(https?:|mailto:)/i;
const INLINE = /(?<!`)(`+)(?!`)([\s\S]*?[^`])\1(?!`)|\*\*([^*]+?)\*\*|__([^_]+?)__|~~([^~]+?)~~|\*([^*\s][^*]*?)\*|(?<![\w_])_([^_\s][^_]*?)_(?![\w_])|\[([^[\]]+)\]\(([^()\s]+(?:\([^()\s]*\))?)\)|(https?:\/\/[^\s<>()]+[^\s<>().,;:!?'"])/;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const TASK = /^\[([ xX])\]\s+/;
const FORMULA = /\$\$([\s\S]+?)\$\$|\\\[((?:(?!\\\[)[\s\S])+?)\\\]|\\\(((?:(?!\\\()[\s\S])+?)\\\)|(?<![\w$])\$(?![\s\d])([^$\n]*[^$\s\\])\$(?![\w$])/;
const TICKS = /`/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const COLUMN_RULE = /^:?-+:?$/;

/** Markdown as a fragment of nodes. */
export function render(text) {
  const fragment = document.createDocumentFragment();
  blocks(text.replace(/\r\n?/g, "\n").split("\n"), fragment, 0);
  return fragment;
}

function element(name, parent, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

function blocks(lines, parent, depth) {
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    const fence = FENCE.exec(line), heading = /^(#{1,6})\s/.exec(line);
    if (!line.trim()) i += 1;
    else if (fence) i = codeBlock(lines, i, fence, parent);
    else if (heading) { inline(headingText(line, heading[1].length), element(`h${Math.min(heading[1].length, 4)}`, parent)); i += 1; }
    else if (RULE.test(line)) { element("hr", parent); i += 1; }
    else if (/^ {0,3}>/.test(line) && depth < 8) i = quote(lines, i, parent, depth);
    else if (ITEM.test(line) && depth < 8) i = list(lines, i, parent, depth);
    else if (line.includes("|") && cells(lines[i + 1] ?? "").every((cell) => COLUMN_RULE.test(cell))) i = table(lines, i, parent);
    else i = paragraph(lines, i, parent, depth);
  }
}

/** A heading without its marks; those at its end stand behind a space. */
function headingText(line, level) {
  return line.slice(level).trim().replace(/(^|\s)#+$/, "").trim();
}

function codeBlock(lines, start, fence, parent) {
  let end = start + 1;
  while (end < lines.length && !(lines[end].trim().startsWith(fence[1]) && !lines[end].trim().replaceAll(fence[1][0], ""))) end += 1;
  const box = element("div", parent);
  box.className = "code";
  const head = element("div", box);
  head.className = "code-head";
  element("span", head, fence[2] || "text");
  const pre = element("pre", box), code = element("code", pre, lines.slice(start + 1, end).join("\n"));
  pre.tabIndex = 0;  // a wide one is scrolled with the keyboard
  if (fence[2]) code.dataset.language = fence[2].toLowerCase();
  const copy = element("button", head, "Copy");
  copy.type = "button";
  copy.addEventListener("click", async () => {
    await navigator.clipboard?.writeText(code.textContent);
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  return end + 1;
}

function quote(lines, start, parent, depth) {
  let end = start;
  while (end < lines.length && /^ {0,3}>/.test(lines[end])) end += 1;
  blocks(lines.slice(start, end).map((line) => line.replace(/^ {0,3}> ?/, "")), element("blockquote", parent), depth + 1);
  return end;
}

function list(lines, start, parent, depth) {
  const first = ITEM.exec(lines[start]), indent = first[1].length, isOrdered = /\d/.test(first[2]);
  const made = element(isOrdered ? "ol" : "ul", parent);
  if (isOrdered && parseInt(first[2], 10) !== 1) made.start = parseInt(first[2], 10);
  let i = start;
  while (i < lines.length) {
    const found = ITEM.exec(lines[i]);
    if (!found || found[1].length !== indent || /\d/.test(found[2]) !== isOrdered || RULE.test(lines[i])) break;
    const own = [found[3]];
    i += 1;
    while (i < lines.length) {
      const isBlank = !lines[i].trim(), inner = /^\s*/.exec(lines[i])[0].length;
      if (isBlank && !(/^\s/.test(lines[i + 1] ?? "") && (lines[i + 1] ?? "").trim())) break;
      if (!isBlank && inner <= indent && (ITEM.test(lines[i]) || FENCE.test(lines[i]) || /^ {0,3}(#|>)/.test(lines[i]))) break;
      own.push(lines[i].slice(Math.min(inner, indent + 2)));
      i += 1;
    }
    const item = element("li", made), lone = own.length === 1, task = TASK.exec(own[0]);
    if (task) {
      own[0] = own[0].slice(task[0].length);
      checkbox(item, task[1] !== " ");
    }
    if (lone) inline(own[0], item);
    else tight(own, item, depth);
    while (i < lines.length && !lines[i].trim() && ITEM.exec(lines[i + 1] ?? "")?.[1].length === indent) i += 1;
  }
  return i;
}

/** The box of a task: it shows, and cannot be changed. */
function checkbox(item, isDone) {
  const box = element("input", item);
  Object.assign(box, { type: "checkbox", checked: isDone, disabled: true, ariaLabel: isDone ? "done" : "open" });
  item.className = "task";
}

/** A list item of several lines: its first paragraph has no <p>. */
function tight(lines, item, depth) {
  let end = 1;
  while (end < lines.length && lines[end].trim() && !ITEM.test(lines[end]) && !FENCE.test(lines[end])) end += 1;
  inline(lines.slice(0, end).join("\n"), item);
  blocks(lines.slice(end), item, depth + 1);
}

/** The cells of a row of a table. */
function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function table(lines, start, parent) {
  const box = element("div", parent), made = element("table", box);
  box.className = "table";
  const head = element("tr", element("thead", made));
  const names = cells(lines[start]);
  names.forEach((name) => inline(name, element("th", head)));
  const body = element("tbody", made);
  let i = start + 2;
  for (; i < lines.length && lines[i].includes("|") && lines[i].trim(); i += 1) {
    const row = element("tr", body), found = cells(lines[i]);
    names.forEach((_, column) => inline(found[column] ?? "", element("td", row)));
  }
  return i;
}

function paragraph(lines, start, parent, depth) {
  let end = start + 1;
  const ends = (line) => !line.trim() || FENCE.test(line) || /^ {0,3}(#{1,6}\s|>)/.test(line) || RULE.test(line) || (depth < 8 && ITEM.test(line));
  while (end < lines.length && !ends(lines[end])) end += 1;
  inline(lines.slice(start, end).join("\n"), element("p", parent));
  return end;
}

function inline(text, parent) {
  let rest = text;
  for (let found; (found = FORMULA.exec(rest)); rest = rest.slice(found.index + found[0].length)) {
    if (TICKS.test(rest.slice(0, found.index))) break;  // it may stand in code
    marked(rest.slice(0, found.index), parent);
    const [, display, display2, short, short2] = found;
    const box = element("span", parent, (display ?? display2 ?? short ?? short2).trim());
    box.className = "formula";
    box.dataset.display = String(Boolean(display ?? display2));
  }
  marked(rest, parent);
}

/** Text with marks, and without formulas. */
function marked(text, parent) {
  let rest = text;
  for (let found; (found = INLINE.exec(rest)); rest = rest.slice(found.index + found[0].length)) {
    words(rest.slice(0, found.index), parent);
    const [whole, ticks, code, strong, strong2, struck, em, em2, label, target, address] = found;
    if (ticks) element("code", parent, code.replace(/^ (.*) $/s, "$1"));
    else if (strong ?? strong2) inline(strong ?? strong2, element("strong", parent));
    else if (struck) inline(struck, element("s", parent));
    else if (em ?? em2) inline(em ?? em2, element("em", parent));
    else if (SAFE_LINK.test(target ?? address)) link(target ?? address, label ?? address, parent);
    else words(whole, parent);
  }
  words(rest, parent);
}

function link(target, label, parent) {
  const made = element("a", parent, label);
  made.href = target;
  made.target = "_blank";
  made.rel = "noopener noreferrer";
}

/** Plain text; two spaces or a backslash at the end of a line are a line break. */
function words(text, parent) {
  text.split(/(?<! ) {2,}\n|\\\n/).forEach((part, number) => {
    if (number) element("br", parent);
    parent.append(part.replace(/\\([\\`*_{}[\]()#+.!|~>-])/g, "$1"));
  });
}
