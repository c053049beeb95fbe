// Numbers of the memory as texts and widths. Pure functions: they know no page.

const whole = new Intl.NumberFormat("en");
const MIB = 2 ** 20;

export const count = (value) => whole.format(Math.round(value));
export const mib = (bytes) => `${(bytes / MIB).toFixed(bytes < 100 * MIB ? 1 : 0)} MiB`;
export const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);
export const percent = (share) => `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;

/**
 * What the gauge shows.
 *
 * The trigger is 0 as long as the server has not told it. Then there is no percentage, and the gauge stays empty:
 * nobody knows yet how full the cache is.
 *
 * @returns texts `left`, `right` and `spoken`, and `widths`, the percentage of the trigger that each kind takes.
 */
export function gauge(stats, trigger, pinnedTokens) {
  const pinned = Math.min(pinnedTokens, stats.exact_tokens), recalled = stats.recalled_tokens;
  const sizes = { pinned, compacted: stats.kv_tokens - stats.exact_tokens - recalled, recalled, exact: stats.exact_tokens - pinned };
  const widths = Object.fromEntries(Object.entries(sizes).map(([kind, size]) => [kind, trigger ? (100 * size) / trigger : 0]));
  const held = `${count(stats.kv_tokens)}${trigger ? ` of ${count(trigger)}` : ""} tokens`;
  return {
    widths,
    left: !stats.logical_tokens ? "empty" : trigger ? `${percent(stats.kv_tokens / trigger)} full` : "",
    right: trigger ? `compacts at ${count(trigger)}` : "",
    spoken: `${held}, for ${count(stats.logical_tokens)} of conversation`,
  };
}

/**
 * The bytes that are held, and those that an uncompacted cache would take.
 *
 * Before the first compaction the cache itself is the uncompacted one. Its spare capacity, which `exact_kv_bytes` does
 * not count, would else make it seem larger than itself.
 */
export function bytes(stats) {
  const uncompacted = stats.num_compactions ? stats.exact_kv_bytes : Math.max(stats.kv_bytes, stats.exact_kv_bytes);
  const most = Math.max(stats.kv_bytes, uncompacted, 1);
  const width = (size) => Math.max((100 * size) / most, 2);
  return { held: mib(stats.kv_bytes), uncompacted: mib(uncompacted), widths: [width(stats.kv_bytes), width(uncompacted)] };
}

/**
 * What the memory did, in words: what is exact, what is compact, what was probably lost.
 *
 * @returns {string[]} one sentence each.
 */
export function inWords({ stats, segments, recalled }) {
  if (!stats.logical_tokens) return ["Nothing has been read yet."];
  const compact = segments.filter((part) => part.kind === "compacted");
  if (!compact.length) return [`All ${count(stats.logical_tokens)} tokens are exact: nothing has been compacted.`];
  const tokens = compact.reduce((sum, part) => sum + part.end - part.start, 0), slots = compact.reduce((sum, part) => sum + part.slots, 0);
  const pinned = segments.find((part) => part.kind === "pinned");
  const first = pinned ? `the first ${count(pinned.end)} tokens and ` : "";
  const back = recalled.reduce((sum, page) => sum + page.end - page.start, 0);
  return [
    `Exact: ${first}the last ${count(stats.logical_tokens - compact.at(-1).end)}.`,
    `Compact: ${count(tokens)} tokens between them, in ${count(slots)} slots a head (${percent(slots / tokens)}). What they are about is kept.`,
    `Probably lost: exact words, numbers and names in the compact part that were said only once.${back ? ` ${count(back)} tokens of it are exact for now, because an answer looked for them.` : ""}`,
  ];
}
