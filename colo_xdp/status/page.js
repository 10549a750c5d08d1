
"use strict";
// All text from the controller goes through append() and textContent: it is never markup.

const STATUS_MS = 2000, TIMEOUT_MS = 4000, LIST_MAX = 50;
const CLASS = {protected: "good", checkpointing: "good", degraded: "warn", solo: "warn",
  promoted: "warn", paused: "warn", stopped: "bad"};
const RANGES = [[900, "15 min"], [3600, "1 h"], [21600, "6 h"]];
const $ = id => document.getElementById(id);

let shown = null;        // the last status document
let answered = 0;        // when it came, by this browser's clock, ms
let skew = 0;            // what the controller's clock is ahead of this one's, s
let trouble = "";        // why there is no newer one
let history = {began: 0, last: 0, every_s: 10, columns: [], rows: []};
let historyAt = 0;
let range = 3600;
let timer = 0;
let asking = false;

// ---- elements

function fill(node, ...children) {
  for (const c of children.flat(3)) if (c !== null && c !== undefined) node.append(c);
  return node;
}
function el(name, className, ...children) {
  const node = document.createElement(name);
  if (className) node.className = className;
  return fill(node, children);
}
function svg(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  return fill(node, children);
}
// Only what differs is replaced, so that a selection or the focus survives.
function show(node, ...children) {
  const next = fill(node.cloneNode(false), children);
  if (!node.isEqualNode(next)) node.replaceChildren(...next.childNodes);
}
function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}
function pairs(list) {
  return list.filter(x => x).map(([k, v, c]) => [el("dt", "", k), el("dd", "", el("span", c || "", v))]);
}
function table(caption, head, rows, none) {
  if (!rows.length) return el("p", "", none);
  const numeric = head.map((_, i) => rows.every(r => typeof r[i] === "number" || r[i] === "–"));
  const cls = i => numeric[i] ? "n" : "";
  const th = head.map((h, i) => { const c = el("th", cls(i), h); c.scope = "col"; return c; });
  return el("table", "", el("caption", "", caption), el("thead", "", el("tr", "", th)),
    el("tbody", "", rows.map(r => el("tr", "", r.map((v, i) => el("td", cls(i), String(v)))))));
}

// ---- numbers

const now = () => Date.now() / 1000 + skew;
const known = v => typeof v === "number" && isFinite(v);
function num(v) {
  if (!known(v)) return "–";
  if (v === 0) return "0";
  const digits = Math.abs(v) >= 100 ? 0 : Math.abs(v) >= 10 ? 1 : 2;
  return Math.abs(v) < 0.01 ? v.toPrecision(1) : String(+v.toFixed(digits));
}
const ms = v => known(v) ? (v >= 10000 ? num(v / 1000) + " s" : num(v) + " ms") : "–";
const ago = v => known(v) ? ms(v) + " ago" : "never";
function span(s) {
  s = Math.max(0, Math.round(s));
  if (s < 120) return s + " s";
  if (s < 7200) return Math.floor(s / 60) + " min";
  if (s < 172800) return Math.floor(s / 3600) + " h " + Math.floor(s % 3600 / 60) + " min";
  return Math.floor(s / 86400) + " d";
}
function bytes(v) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (v >= 1024 && i < units.length - 1) { v /= 1024; i++; }
  return num(v) + " " + units[i];
}
const clock = t => new Date(t * 1000).toLocaleTimeString([], {hour: "2-digit", minute: "2-digit", hourCycle: "h23"});
const moment = t => new Date(t * 1000).toLocaleString("sv-SE");  // 2026-11-30 01:25:52

// ---- the status document

function summary(s) {
  const a = s.active, right = {held: "the lease is held", promised: "the other host stays silent", none: "no lease"};
  const why = [right[a.lease], known(a.remaining_s) && a.remaining_s ? num(a.remaining_s) + " s left" : ""].filter(x => x).join(", ");
  const f = s.last_failover;
  return pairs([
    ["guest", (a.transmitting ? "transmits" : "is silent") + (why ? " (" + why + ")" : "") +
      (a.undecided ? "; not decided yet whether it may transmit" : "") +
      (a.disks_unproven ? "; its disks may lack what was written last" : "")],
    s.if_peer_died && s.if_peer_died.sentence && ["if the peer died", s.if_peer_died.sentence],
    s.paused && ["paused", "failover decisions are left to an operator", "warn"],
    ["data path", s.data_path.trouble || "whole", s.data_path.trouble ? "bad" : ""],
    ["QEMU", (s.qemu.connected ? "connected" : "NOT connected") + ` ${s.qemu.version} ${s.qemu.accel}` +
      (s.qemu.gone ? "; this host's guest is lost" : ""), s.qemu.connected && !s.qemu.gone ? "" : "bad"],
    ["peer", (s.peer.connected ? "connected " : "NOT connected ") + s.peer.state, s.peer.connected ? "" : "bad"],
    ["epoch, mode", `${s.epoch}, ${s.mode}, ${a.sync}`],
    ["held", `${num(s.held.packets)} of ${num(s.held.limit)} packets, ${bytes(s.held.bytes)}`],
    ["connections", `${num(s.flows.tracked)} of ${num(s.flows.limit)}`],
    s.patience.source && ["patience", `${ms(s.patience.ms)} (${s.patience.source}); the SVM lags by ${ms(s.patience.lag_ms)}, ` +
      `a checkpoint takes ${ms(s.patience.checkpoint_ms)}, ${s.patience.needless} were needless`],
    ["hook", `${s.hook || "none"}, events by ${s.events || "no"} buffer, ${s.ring.lost} lost`, s.ring.lost ? "warn" : ""],
    f && ["last failover", `the network received nothing for ${ms(f.gap_ms)}; it took ${ms(f.took_ms)}`],
    ...s.failures.slice(-5).map(x => ["internal error", x, "bad"]),
  ]);
}
function checkpoints(s) {
  const c = s.checkpoints, by = Object.entries(c.by_cause).filter(x => x[1]).sort((x, y) => y[1] - x[1]);
  return [
    el("p", "", `${c.total} completed, ${c.failed} failed` + (c.delayed ? `, ${c.delayed} delayed by ${num(c.delay_s)} s in all` : "") +
      (c.last ? `. The last one, ${span(now() - c.last.at)} ago: ${c.last.cause}: ${c.last.detail}; ` +
        `pause ${ms(c.last.pause_ms)}, ${ms(c.last.total_ms)} in all.` : ".")),
    by.length ? table("Since the controller started", ["cause", "checkpoints"], by, "") : null,
  ];
}
function links(s) {
  const rows = [["control channel", ago(s.peer.silent_ms), "–", ms(s.peer.rtt_us / 1000), s.peer.connected ? "" : "not connected"],
    ...s.heartbeat_links.map(w => [w.name, ago(w.silent_ms), ago(w.echo_age_ms), ms(w.rtt_us / 1000), w.trouble])];
  return table("What carries heartbeats", ["link", "received", "acknowledged", "round trip", "trouble"], rows, "");
}
function nics(s) {
  return table("The guest's NICs", ["NIC", "tap", "bridge", "MAC address", "peer link", "connections", "held", "trouble"],
    s.nics.map(n => [n.name, n.tap, n.bridge || "–", n.mac || "not known yet", n.peer_link, n.flows, n.held, n.trouble]), "None is known yet.");
}
function disks(s) {
  const d = s.disks, c = d.copying;
  if (!d.names.length) return pairs([["disks", "none is replicated"]]);
  return pairs([
    ["names", d.names.join(", ")],
    s.role === "primary" ? ["mirrored", d.mirrored ? "each write goes to both hosts" : "no", d.mirrored ? "" : "warn"]
      : ["exported", d.exported ? "the other host can write to the images" : "no"],
    d.lost && ["lost", d.lost, "bad"],
    c && ["first copy", `${bytes(c.done)} of ${bytes(c.total)}, ${bytes(c.rate)}/s` + (known(c.left_s) ? `, ${span(c.left_s)} left` : "")],
    d.committing && ["committing", "QEMU merges the overlays after a takeover"],
    ...Object.entries(d.overlays).slice(0, LIST_MAX).map(([k, v]) => ["overlay " + k, bytes(v)]),
    d.room_trouble && ["room", d.room_trouble, "warn"],
  ]);
}
function rules(s) {
  return [
    table("Rules of the policy, in their order", ["rule", "action", "flows", "left uncompared", "differences"],
      s.rules.slice(0, LIST_MAX).map(r => [r.name, r.action || "no longer in force", r.flows, r.uncompared, r.differences]), "This host compares nothing."),
    s.divergences.length ? table("Last differences, newest first", ["cause", "flow", "rule", "NIC", "at byte"],
      s.divergences.slice(-LIST_MAX).reverse().map(d => [d.cause, d.flow, d.rule, d.nic, d.offset]), "") : null,
  ];
}
function changes(s) {
  return table("Newest first", ["time", "state", "why"],
    s.history.slice().reverse().map(h => [moment(h.at), h.state, h.reason]), "There was none since the controller started.");
}
function render() {
  const s = shown;
  document.title = `${s.state}: ${s.pair} ${s.role}`;
  text($("title"), `${s.pair} ${s.role}`);
  text($("state"), s.state);
  $("state").className = CLASS[s.state] || "calm";
  text($("reason"), s.reason);
  for (const [id, make] of Object.entries({now: summary, changes, checkpoints, links, nics, disks, rules})) show($(id), make(s));
}
function age() {
  const old = trouble || (answered && Date.now() - answered > 3 * STATUS_MS);
  text($("age"), !answered ? "no answer yet" : `in this state for ${span(now() - shown.since)}, as of ${span((Date.now() - answered) / 1000)} ago`);
  document.body.classList.toggle("old", Boolean(old && answered));
  $("silent").hidden = !old;
  if (old) text($("silent"), "The controller does not answer: " + (trouble || "no reason given") +
    (answered ? `. What is shown is from ${moment(answered / 1000)}.` : "."));
}

// ---- the history

const LEFT = 44, RIGHT = 6, BOTTOM = 16;

function recent() {
  const to = now(), from = to - range, names = history.columns;
  const rows = history.rows.filter(r => r[0] >= from - history.every_s)
    .map(r => Object.fromEntries(names.map((k, i) => [k, r[i]])));
  return {from, to, rows};
}
function frame(view, width, height) {
  const x = t => LEFT + (t - view.from) / (view.to - view.from) * (width - LEFT - RIGHT);
  const step = [60, 300, 600, 1800, 3600, 7200].find(s => (view.to - view.from) / s * 60 < width) || 7200;
  const nodes = [];
  for (let t = Math.ceil(view.from / step) * step; t < view.to; t += step) {
    nodes.push(svg("line", {class: "grid", x1: x(t), x2: x(t), y1: 2, y2: height - BOTTOM}));
    if (x(t) > LEFT + 8 && x(t) < width - 20)
      nodes.push(svg("text", {x: x(t), y: height - 3, "text-anchor": "middle"}, clock(t)));
  }
  return {x, nodes};
}
function picture(label, width, height, nodes) {
  return svg("svg", {role: "img", "aria-label": label, width, height, viewBox: `0 0 ${width} ${height}`}, nodes);
}
function nice(v) {
  if (!(v > 0)) return 1;
  const e = 10 ** Math.floor(Math.log10(v));
  return [1, 2, 5, 10].map(m => m * e).find(x => x >= v * 0.999);
}
// As many points as can be told apart: of each few samples the highest, or their mean.
function thin(view, series, most) {
  const bin = Math.max(history.every_s, range / most), out = [];
  for (const r of view.rows) {
    const v = r[series.key], b = Math.floor(r.at / bin), last = out.at(-1);
    if (!known(v)) out.push(null);
    else if (last && last.bin === b) {
      last.n++; last.at = r.at; last.sum += v; last.max = Math.max(last.max, v);
    } else out.push({bin: b, n: 1, at: r.at, sum: v, max: v});
  }
  return out.map(p => p && {at: p.at, value: series.mean ? p.sum / p.n : p.max});
}
// A line for each series; a break where there is no number.
function lines(view, series, unit, width, log) {
  const height = 96, {x, nodes} = frame(view, width, height), bottom = height - BOTTOM;
  const values = series.flatMap(s => view.rows.map(r => r[s.key])).filter(known);
  const top = nice(Math.max(...values, log ? 0.1 : 0));
  const low = log ? Math.min(top / 10, 10 ** Math.floor(Math.log10(Math.max(1e-3, Math.min(...values.filter(v => v > 0), top))))) : 0;
  const y = v => bottom - (log ? Math.log(Math.max(v, low) / low) / Math.log(top / low) : v / top) * (bottom - 6);
  for (const v of [low, log ? Math.sqrt(low * top) : top / 2, top])
    nodes.push(svg("line", {class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(v), y2: y(v)}),
      svg("text", {x: LEFT - 4, y: y(v) + 4, "text-anchor": "end"}, num(v)));
  series.forEach((s, i) => {
    let path = "", before = null;
    const most = (width - LEFT - RIGHT) / 2, far = 2.5 * Math.max(history.every_s, range / most);
    for (const p of thin(view, s, most)) {
      if (p) {
        const at = `${x(p.at).toFixed(1)} ${y(p.value).toFixed(1)}`;
        path += before !== null && p.at - before < far ? "L" + at : `M${at}h.1`;
      }
      before = p && p.at;
    }
    nodes.push(svg("path", {class: "p" + i, d: path}));
  });
  const label = series.map(s => {
    const found = view.rows.map(r => r[s.key]).filter(known);
    return found.length ? `${s.name}: now ${num(found.at(-1))}, from ${num(Math.min(...found))} to ${num(Math.max(...found))} ${unit}` : `${s.name}: nothing`;
  }).join("; ");
  return [label, picture(label, width, height, nodes)];
}
// What the samples missed between two of them is in the status document's changes.
function segments(view) {
  const same = s => s === "checkpointing" ? "protected" : s;
  const points = [...view.rows.map(r => [r.at, same(r.state)]),
    ...(shown ? shown.history.map(h => [h.at, same(h.state)]) : [])].sort((a, b) => a[0] - b[0]);
  const out = [];
  points.forEach(([at, state], i) => {
    const next = i + 1 < points.length ? points[i + 1][0] : view.to;
    const end = view.rows.length && at >= view.rows[0].at && next - at > 4 * history.every_s ? at + history.every_s : next;
    if (end < view.from || (view.rows.length && at < view.rows[0].at - 4 * history.every_s)) return;
    const begin = Math.max(at, view.from), last = out.at(-1);
    if (last && last.state === state && begin - last.end < 1) last.end = end;
    else out.push({state, begin, end});
  });
  return out;
}
function band(view, width) {
  const height = 44, {x, nodes} = frame(view, width, height), total = {};
  for (const s of segments(view)) {
    const wide = Math.max(1.5, x(s.end) - x(s.begin)), kind = CLASS[s.state] || "calm";
    // without colours: what is not protected is higher, and has its name
    const y = kind === "good" ? 9 : 2;
    nodes.push(svg("rect", {class: kind, x: x(s.begin), y, width: wide, height: 26 - y}, svg("title", {}, `${s.state} from ${clock(s.begin)} to ${clock(s.end)}`)));
    if (wide > 8 * s.state.length) nodes.push(svg("text", {class: "in", x: x(s.begin) + wide / 2, y: 21, "text-anchor": "middle"}, s.state));
    total[s.state] = (total[s.state] || 0) + s.end - s.begin;
  }
  const label = Object.entries(total).map(([k, v]) => `${k} ${span(v)}`).join(", ") || "nothing";
  return [label, picture(label, width, height, nodes)];
}
// A row for each cause: no colour has to tell them apart.
function causes(view, width) {
  const total = {};
  for (const r of view.rows) for (const [k, n] of Object.entries(r.checkpoints)) total[k] = (total[k] || 0) + n;
  const names = Object.keys(total).sort((a, b) => total[b] - total[a]).slice(0, 8);
  const bin = Math.max(60, range / 120), left = LEFT, rowHeight = 30, height = names.length * rowHeight + BOTTOM + 2;
  const {x, nodes} = frame(view, width, Math.max(height, 40));
  const most = {};
  const bins = names.map(k => {
    const out = {};
    for (const r of view.rows) if (r.checkpoints[k]) {
      const b = Math.floor(r.at / bin) * bin;
      out[b] = (out[b] || 0) + r.checkpoints[k] * 60 / bin;
      most.n = Math.max(most.n || 0, out[b]);
    }
    return out;
  });
  names.forEach((k, i) => {
    const base = (i + 1) * rowHeight;
    for (const [b, n] of Object.entries(bins[i])) {
      const from = Math.max(left, x(+b)), h = Math.max(1, n / most.n * (rowHeight - 16));
      nodes.push(svg("rect", {class: "bar", x: from, y: base - h, width: Math.max(1, x(+b + bin) - from - 0.5), height: h}));
    }
    nodes.push(svg("line", {class: "mark", x1: left, x2: width - RIGHT, y1: base, y2: base}),
      svg("text", {x: left + 4, y: base - rowHeight + 13}, `${k}: ${total[k]}, up to ${num(Math.max(...Object.values(bins[i])))} per minute`));
  });
  const label = names.map(k => `${k} ${total[k]}`).join(", ") || "none";
  return [label, picture("checkpoints by cause: " + label, width, Math.max(height, 40), nodes)];
}
const PLOTS = [
  ["State", "wide", band],
  ["Checkpoints per minute, by cause", "wide", causes],
  ["Frames of the guest per second", "", (v, w) => lines(v, [{key: "frames_per_s", name: "frames", mean: true}], "/s", w)],
  ["Wait of a frame, ms (logarithmic)", "", (v, w) => lines(v, [{key: "wait_p50_ms", name: "median"}, {key: "wait_p99_ms", name: "99 % (dashed)"}], "ms", w, true)],
  ["Frames held", "", (v, w) => lines(v, [{key: "held", name: "frames"}], "", w)],
  ["Share of the fast path, %", "", (v, w) => lines(v, [{key: "fast_percent", name: "share", mean: true}], "%", w)],
  ["Checkpoint and SVM lag, ms", "", (v, w) => lines(v, [{key: "checkpoint_ms", name: "a checkpoint takes"}, {key: "lag_ms", name: "lag (dashed)"}], "ms", w)],
  ["Silence of the peer, ms", "", (v, w) => lines(v, [{key: "silent_ms", name: "since its last message"}], "ms", w)],
];
function plot() {
  const view = recent(), room = $("plots").clientWidth || 700;
  for (const r of view.rows) r.fast_percent = known(r.fast_share) ? r.fast_share * 100 : null;
  const columns = Math.max(1, Math.floor((room + 10) / (26 * 14 + 10)));
  const one = Math.floor((room - (columns - 1) * 9) / columns) - 20;
  show($("plots"), PLOTS.map(([name, kind, draw]) => {
    const [label, picture] = draw(view, kind ? room - 20 : one);
    return el("figure", kind, el("figcaption", "", el("h3", "", name), el("span", "", label)), picture);
  }));
  if ($("rows").open) {
    const rows = view.rows.slice(-60).reverse();
    show($("rows").lastElementChild, table("The last samples, newest first",
      ["time", "state", "frames/s", "median ms", "99 % ms", "held", "fast path %", "checkpoints", "silent ms"],
      rows.map(r => [clock(r.at), r.state, r.frames_per_s, r.wait_p50_ms, r.wait_p99_ms, r.held, r.fast_percent, Object.entries(r.checkpoints).map(([k, n]) => `${k} ${n}`).join(", "), r.silent_ms]
        .map(v => typeof v === "number" ? +num(v) : v === null ? "–" : v)), "There is none yet."));
  }
}
function buttons() {
  show($("range"), RANGES.map(([seconds, name]) => {
    const b = el("button", "", name);
    b.type = "button";
    b.setAttribute("aria-pressed", String(seconds === range));
    return b;
  }));
  [...$("range").children].forEach((b, i) => b.addEventListener("click", () => {
    range = RANGES[i][0];
    [...$("range").children].forEach(x => x.setAttribute("aria-pressed", String(x === b)));
    plot();
  }));
}

// ---- asking

async function ask(path) {
  const abort = new AbortController(), alarm = setTimeout(() => abort.abort(), TIMEOUT_MS);
  try {
    const r = await fetch(path, {cache: "no-store", signal: abort.signal});
    if (!r.ok) throw new Error(`${r.status}: ${(await r.text()).slice(0, 200).trim()}`);
    const date = Date.parse(r.headers.get("Date") || "");
    // the header has whole seconds
    if (known(date) && Math.abs(date / 1000 + 0.5 - now()) > 1.5) skew = date / 1000 + 0.5 - Date.now() / 1000;
    return await r.json();
  } catch (e) {
    throw abort.signal.aborted ? new Error(`no answer in ${TIMEOUT_MS / 1000} s`) : e;
  } finally {
    clearTimeout(alarm);
  }
}
async function askHistory() {
  let h = await ask(`history.json?after=${history.last}`);
  if (h.began !== history.began && history.last) h = await ask("history.json");
  const kept = h.began === history.began ? history.rows : [];
  history = {...h, last: Math.max(h.last, h.began === history.began ? history.last : 0), rows: [...kept, ...h.rows].slice(-h.hours * 3600 / h.every_s)};
  historyAt = Date.now();
}
async function poll() {
  clearTimeout(timer);
  if (document.hidden || asking) return;
  asking = true;
  try {
    shown = await ask("status.json");
    answered = Date.now();
    if (Date.now() - historyAt > history.every_s * 1000) await askHistory();
    trouble = "";
    render();
    plot();
  } catch (e) {
    trouble = e instanceof Error ? e.message : String(e);
  }
  asking = false;
  age();
  timer = setTimeout(poll, STATUS_MS);
}

buttons();
$("rows").addEventListener("toggle", plot);
addEventListener("resize", plot);
document.addEventListener("visibilitychange", poll);
setInterval(age, 1000);
poll();
