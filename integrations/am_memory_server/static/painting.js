// Code in colours and formulas as such, with libraries that are loaded when a message needs them.
//
// Nothing that a library returns becomes markup of the page: of highlighted code, only texts and the names of colours
// are taken, and KaTeX builds its nodes itself and trusts no command.

const MAX_CODE = 50_000, MAX_FORMULA = 2_000, MAX_FORMULAS = 500;  // what is longer stays plain text: it would block the page
const COLOUR = /^hljs-[\w-]+$/;

/** Paint the code and the formulas of a message that is complete. */
export async function paint(body) {
  const codes = [...body.querySelectorAll("code[data-language]")].filter((code) => code.textContent.length <= MAX_CODE);
  const formulas = [...body.querySelectorAll(".formula")].filter((one) => one.textContent.length <= MAX_FORMULA).slice(0, MAX_FORMULAS);
  if (codes.length) {
    const { default: library } = await import("./vendor/highlight/highlight.min.js");
    codes.filter((code) => library.getLanguage(code.dataset.language)).forEach((code) => {
      const { value } = library.highlight(code.textContent, { language: code.dataset.language, ignoreIllegals: true });
      const parsed = new DOMParser().parseFromString(value, "text/html");  // an inert document: nothing in it loads or runs
      code.replaceChildren(...inert(parsed.body));
    });
  }
  if (formulas.length) {
    await import("./vendor/katex/katex.min.js");
    formulas.forEach((formula) => {
      const { textContent: source } = formula;
      self.katex.render(source, formula, { displayMode: formula.dataset.display === "true", throwOnError: false, trust: false, maxExpand: 100, maxSize: 20 });
    });
  }
}

/** The texts of a node, in spans that have colours and nothing else. */
function inert(parent) {
  return [...parent.childNodes].map((node) => {
    if (node.nodeType !== Node.ELEMENT_NODE) return node.textContent;
    const span = document.createElement("span");
    span.className = [...node.classList].filter((name) => COLOUR.test(name)).join(" ");
    span.append(...inert(node));
    return span;
  });
}
