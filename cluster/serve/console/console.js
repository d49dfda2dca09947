// The console: everything it shows and does goes through the service's own API.
//
// The token is a variable of this module, so a reload asks for it again. sessionStorage would outlive the
// reload, but browsers write it to the disk of a profile, where a token has no business.
// Data becomes text nodes and attributes (`h`), never markup; the page's policy (`require-trusted-types-for`)
// makes a browser refuse innerHTML.

let token = "";
let seen = ""; // what the queue and the grid show, as JSON
let shown = ""; // id of the request in the dialog
let asked = null; // what was checked last, as it will be sent
let timer = 0;

const BUSY_MS = 4000, IDLE_MS = 30000;
const SOON_DAYS = 7;
const CLOSED = ["completed", "denied", "cancelled"];
const WAITING = ["received", "held", ...CLOSED]; // nothing happens by itself
const WORDS = {
  received: "Received, waits for a decision", approved: "Approved, waits to be run",
  held: "Under a legal hold", denied: "Denied", cancelled: "Cancelled",
  committed: "Accepted: what remains is fixed", rolled_back: "Served model is clean",
  erased: "Bytes are erased, retraining is to come", erasure_failed: "Erasure failed, to be retried",
  retrained: "Retrained", completed: "Completed", failed: "Failed, to be retried",
};
const TONES = { completed: "good", erasure_failed: "bad", failed: "bad", held: "warn", received: "warn" };
const DECISIONS = { // by state: what the service allows
  received: ["approve", "deny", "hold", "extend", "cancel"], approved: ["hold", "deny", "extend", "cancel"],
  held: ["approve", "deny", "extend", "cancel"], failed: ["approve", "hold", "deny", "cancel"],
};
const NEEDS_REASON = ["deny", "hold", "extend"];
const READY = ["approved", "failed"]; // to be carried out
const NAMES = { approve: "Approve", deny: "Deny", hold: "Hold", extend: "Extend", cancel: "Withdraw" };
const DONE = { approve: "Approved.", deny: "Denied.", hold: "Put under a hold.", extend: "Extended.", cancel: "Withdrawn." };
const SLICES = { // state: class, sign, meaning
  clean: ["c", "●", "trained on its records; no deletion has touched it"],
  retrained: ["t", "↻", "trained again, without the deleted records, after a deletion"],
  "rolled back": ["r", "↶", "not in the served model until it is trained"],
  restricted: ["x", "⊘", "trained on a record whose use is restricted, and not served until that is released"],
  empty: ["e", "–", "holds no records"],
};

const $ = (id) => document.getElementById(id);

// Make an element; children are texts and elements.
function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((each) => each !== null));
  return made;
}

// Text that people wrote: control characters are replaced, its direction is its own.
const given = (text) => h("bdi", { dir: "auto" }, String(text).replace(/[\p{Cc}\p{Bidi_C}]/gu, "\uFFFD"));
const code = (text) => h("code", { class: "digest" }, text);
const tag = (text, tone = "") => h("span", { class: `tag ${tone}` }, text);
const counted = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const moment = (at) => h("time", { datetime: at }, `${at.slice(0, 10)} ${at.slice(11, 16)} UTC`);
const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}%` : "0%");

// Replace what an element holds; the focus stays on the control with the same id.
function fill(place, ...children) {
  const active = place.contains(document.activeElement) ? document.activeElement.id : "";
  place.replaceChildren(...children.filter((each) => each !== null));
  if (active) $(active)?.focus({ preventScroll: true });
}

// A table in a region that scrolls. On a phone the rows of a "stack" are cards; roles keep it a table.
function table(id, label, names, rows, kind = "stack") {
  const region = { class: "scroll", role: "region", "aria-labelledby": id, tabindex: "0" };
  for (const row of kind === "stack" ? rows : []) {
    row.setAttribute("role", "row");
    [...row.children].forEach((cell, n) => {
      cell.setAttribute("role", cell.tagName === "TH" ? "rowheader" : "cell");
      if (names[n]) cell.setAttribute("data-label", names[n]);
    });
  }
  return [
    h("p", { class: "label", id }, label),
    h("div", region, h("table", { class: kind, role: "table", "aria-labelledby": id },
      h("thead", {}, h("tr", {}, ...names.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", { role: "rowgroup" }, ...rows))),
  ];
}

function facts(pairs) {
  const found = pairs.filter(([, value]) => value !== null && value !== "");
  return h("dl", { class: "row" }, ...found.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

// --- the API ---------------------------------------------------------------------------------------

class Fault extends Error {
  constructor(status, body) {
    super(body.detail || "The service refused.");
    this.status = status;
    this.problems = (body.problems || []).map((each) => `${each.where}: ${each.what}`);
    this.more = [body.expected && `expected ${body.expected}`, body.got && `got ${body.got}`, body.next_step].filter(Boolean);
  }
}

// Return the response; throw a Fault for a refusal.
async function ask(path, body, more = {}) {
  const headers = { Accept: "application/json", ...more };
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const request = { method: body === undefined ? "GET" : "POST", headers, cache: "no-store", credentials: "omit", redirect: "error" };
  let answer;
  try {
    answer = await fetch(path, { ...request, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Fault(0, { detail: "The service can't be reached." });
  }
  if (answer.ok) return answer;
  throw new Fault(answer.status, await answer.json().catch(() => ({ detail: `The service answered ${answer.status}.` })));
}

const call = async (...asked) => (await ask(...asked)).json();

// --- what is said ----------------------------------------------------------------------------------

function say(text, where = "") {
  fill($(`${where}fault`));
  fill($(`${where}said`), text);
}

function complain(fault, where = "") {
  if (!(fault instanceof Fault)) throw fault;
  if (fault.status === 401) return signOut(token ? "This token is not valid (any more)." : "");
  const list = fault.problems.length ? h("ul", {}, ...fault.problems.map((each) => h("li", {}, given(each)))) : null;
  fill($(`${where}said`));
  fill($(`${where}fault`), given([fault.message, ...fault.more].join("; ")), list);
}

// Carry out what a form or a button asks for, once at a time, and say what went wrong.
async function attempt(control, work, where = "") {
  if (control.disabled) return;
  control.disabled = true;
  try {
    await work();
  } catch (fault) {
    complain(fault, where);
  } finally {
    control.disabled = false;
    if (document.activeElement === document.body && control.checkVisibility()) control.focus();
  }
}

// --- signing in ------------------------------------------------------------------------------------

async function signIn(given_) {
  token = given_;
  try {
    await refresh();
  } catch (fault) {
    return complain(fault);
  }
  $("sign-in").hidden = true;
  $("token").value = "";
  for (const id of ["signed-in", "sections"]) $(id).hidden = false;
  $("sign-out").hidden = !token;
  if (token) {
    say("Signed in.");
    $("content").focus({ preventScroll: true });
  }
}

function signOut(why = "") {
  clearTimeout(timer);
  token = shown = seen = "";
  $("request").close();
  for (const id of ["signed-in", "sections", "sign-out"]) $(id).hidden = true;
  for (const id of ["tiles", "queue", "plan-body", "hits", "grid", "request-title", "request-body"]) fill($(id));
  for (const id of ["erase-form", "find-form", "decide-form"]) $(id).reset();
  for (const each of document.querySelectorAll(".said")) fill(each);
  chooseBy();
  stale();
  $("model").textContent = "Sign in to see the model.";
  fill($("fault"), why);
  $("sign-in").hidden = false;
  $("token").focus();
}

// --- requests, tiles and the grid ------------------------------------------------------------------

async function refresh() {
  clearTimeout(timer);
  const model = await call("/shards"); // first alone: an attempt without a valid token counts once
  const { requests } = await call("/requests");
  const now = JSON.stringify([requests, model]);
  if (now !== seen) {
    seen = now;
    showModel(model, requests);
    showQueue(requests);
    showGrid(model.shards);
    if (shown) await showRequest(shown);
  }
  timer = setTimeout(poll, requests.every((each) => WAITING.includes(each.state)) ? IDLE_MS : BUSY_MS);
}

async function poll() {
  if (document.visibilityState === "hidden") {
    timer = setTimeout(poll, BUSY_MS);
    return;
  }
  try {
    await refresh();
    if ($("fault").dataset.lost) complained(false);
  } catch (fault) {
    complain(fault);
    if (fault.status !== 401) {
      complained(true);
      timer = setTimeout(poll, IDLE_MS);
    }
  }
}

// Remember that a message is about a lost connection, which the next good answer ends.
function complained(lost) {
  if (lost) $("fault").dataset.lost = "yes";
  else {
    delete $("fault").dataset.lost;
    fill($("fault"));
  }
}

function showModel(model, requests) {
  const open = requests.filter((each) => !CLOSED.includes(each.state));
  const due = open.map((each) => each.due).sort()[0];
  const shards = model.shards;
  const trained = shards.filter((each) => each.converged).length;
  const done = requests.filter((each) => each.state === "completed").length;
  const tile = (name, number, more) =>
    h("div", { class: "tile" }, h("dt", {}, name), h("dd", { class: "number" }, number), h("dd", { class: "small" }, more));
  fill($("model"), "Model ", code(model.model));
  const records = shards.reduce((sum, each) => sum + each.records, 0);
  fill($("tiles"),
    tile("Open requests", String(open.length), due ? `next due ${due}` : "none waits"),
    tile("Completed", String(done), "deletions so far"),
    tile("Records held", records.toLocaleString("en"), `in ${counted(shards.length, "shard")}`),
    tile("Shards fully trained", `${trained} of ${shards.length}`, trained === shards.length ? "nothing is to be trained" : "others are clean, and wait for training"));
}

function left(request) {
  if (CLOSED.includes(request.state)) return tag("closed");
  if (request.days_left < 0) return tag(`overdue by ${counted(-request.days_left, "day")}`, "bad");
  return tag(`${counted(request.days_left, "day")} left`, request.days_left <= SOON_DAYS ? "warn" : "");
}

function showQueue(requests) {
  const row = (each) => h("tr", {},
    h("th", { scope: "row" }, h("button", { type: "button", class: "name", id: `open-${each.request_id}`, click: (event) => attempt(event.currentTarget, () => openRequest(each.request_id)) },
      given(each.external_id || each.request_id))),
    h("td", {}, tag(WORDS[each.state] || each.state, TONES[each.state])),
    h("td", {}, left(each)),
    h("td", { class: "whole" }, each.due),
    h("td", { class: "number" }, each.num_records.toLocaleString("en")));
  const names = ["Request", "State", "Days left", "Due", "Records"];
  const open = requests.filter((each) => !CLOSED.includes(each.state)).sort((one, other) => one.due.localeCompare(other.due));
  const closed = requests.filter((each) => CLOSED.includes(each.state)).reverse();
  const wasOpen = $("closed")?.open ?? open.length === 0;
  $("run").hidden = !open.some((each) => READY.includes(each.state));
  fill($("queue"),
    ...(open.length ? table("queue-label", "Open, the most urgent first", names, open.map(row)) : [h("p", {}, "No request is open.")]),
    closed.length ? h("details", { id: "closed", open: wasOpen }, h("summary", { id: "closed-summary" }, `Closed: ${counted(closed.length, "request")}`),
      ...table("closed-label", "Closed, the newest first", names, closed.map(row))) : null);
}

function showGrid(shards) {
  const columns = Math.max(0, ...shards.map((each) => each.slices.length));
  const cell = ({ state, records }) => {
    const [style, sign] = SLICES[state] || ["e", "?"];
    const label = state === "empty" ? state : `${state}, ${counted(records, "record")}`;
    return h("td", { class: style, title: label, "aria-label": label }, records ? `${sign} ${records.toLocaleString("en")}` : sign);
  };
  const rows = shards.map((each) => h("tr", {},
    h("th", { scope: "row" }, String(each.shard)),
    ...Array.from({ length: columns }, (_, n) => (each.slices[n] ? cell(each.slices[n]) : h("td", { class: "e" }, "–"))),
    h("td", {}, `${each.served_depth} of ${each.num_stages}`),
    h("td", { class: "head" }, each.served ? h("span", { title: each.served }, code(each.served.slice(0, 12))) : "the base alone")));
  const names = ["Shard", ...Array.from({ length: columns }, (_, n) => `slice ${n}`), "served", "head"];
  fill($("grid"), ...table("grid-label", "Slices with the number of records in each, what each shard serves, and its head", names, rows, "grid"));
}

async function run() {
  const { requests } = await call("/requests/run", {});
  say(`${counted(requests.length, "request")} will be carried out now.`);
  await refresh();
}

// --- one request -----------------------------------------------------------------------------------

async function openRequest(id) {
  $("decide-form").reset();
  fill($("request-said"));
  fill($("request-fault"));
  await showRequest(id);
  shown = id;
  $("request").showModal();
}

async function showRequest(id) {
  const found = await call(`/requests/${encodeURIComponent(id)}`);
  fill($("request-title"), given(found.external_id || found.request_id));
  const certificate = { issued: ["certificate issued", "good"], pending: ["certificate pending", "warn"] }[found.certificate];
  fill($("request-body"),
    h("p", { class: "tags" }, tag(WORDS[found.state] || found.state, TONES[found.state]), " ", left(found), " ",
      certificate ? tag(...certificate) : found.state === "completed" ? tag("not certified") : null),
    found.reason ? h("p", {}, given(found.reason)) : null,
    facts([
      ["Id", code(found.request_id)], ["Received", found.received_on || null], [found.received_on ? "Entered" : "Received", moment(found.created_at)],
      ["Due", `${found.due} (${found.regime === "gdpr" ? "GDPR" : "Delete Act"})`],
      ["Extended", found.extension ? given(found.extension) : null],
      ["Records", String(found.num_records)],
      ["Waits for a legal hold", found.held_by.length ? given(found.held_by.join(", ")) : null],
      ["Exact copies", found.num_copies ? `${found.num_copies}, ${found.copies_included ? "" : "not "}included` : null],
      ["Approved by", found.approver ? given(found.approver) : null],
      ["Retrained", found.committed_at ? found.shards.filter(([, , count]) => count).map(([shard, first, count]) => `shard ${shard}: ${counted(count, "slice")} from ${first} on`).join("; ") || "nothing" : null],
      ["Cost of its batch", found.committed_at ? `${found.record_epochs_retrained} of ${found.record_epochs_full} record-epochs (${share(found.record_epochs_retrained, found.record_epochs_full)}), ${found.seconds.toFixed(1)} s` : null],
      ["Cause of the failure", found.cause ? given(found.cause) : null],
    ]),
    h("h3", { id: "timeline-title" }, "Timeline"),
    h("ol", { class: "timeline", "aria-labelledby": "timeline-title" },
      ...found.events.map((each) => h("li", {}, h("strong", {}, WORDS[each.state] || each.state), " ", moment(each.at), ...(each.note ? [h("br"), given(each.note)] : [])))),
    found.certificate === "issued" ? h("p", {}, h("button", { type: "button", id: "save-certificate", click: (event) => attempt(event.currentTarget, () => saveCertificate(found.request_id), "request-") }, "Save the certificate")) : null);
  const allowed = (DECISIONS[found.state] || []).filter((each) => each !== "extend" || (found.regime === "gdpr" && !found.extension));
  $("decide-form").hidden = !allowed.length;
  fill($("decisions"), ...allowed.map((each) =>
    h("button", { type: "submit", value: each, id: `decide-${each}`, class: each === "approve" ? "primary" : "" }, NAMES[each])));
}

// Return to where the request is in the queue now; what is closed may lie in a folded list.
function closed() {
  const row = $(`open-${shown}`);
  shown = "";
  (row?.checkVisibility() ? row : $("closed-summary"))?.focus();
}

async function decide(decision) {
  const note = $("note").value.trim();
  if (!note && NEEDS_REASON.includes(decision)) {
    $("note").focus();
    throw new Fault(400, { detail: "This decision needs a reason." });
  }
  const body = decision === "approve" || !note ? {} : { reason: note }; // an approval names the caller
  await call(`/requests/${encodeURIComponent(shown)}/${decision}`, body);
  $("decide-form").reset();
  await showRequest(shown);
  say(DONE[decision], "request-");
  $("close").focus();
  await refresh();
}

async function saveCertificate(id) {
  const found = await ask(`/requests/${encodeURIComponent(id)}/certificate`);
  const url = URL.createObjectURL(await found.blob()); // as it was written, to the byte
  h("a", { href: url, download: `${id}.certificate.json` }).click();
  URL.revokeObjectURL(url);
  say("Saved. `sisa verify-certificate` checks the file without this service.", "request-");
}

// --- erasing ---------------------------------------------------------------------------------------

function chooseBy() {
  const by = new FormData($("erase-form")).get("by");
  for (const id of ["ids", "subject"]) {
    $(id).closest("p").hidden = id !== by;
    $(id).required = id === by;
  }
}

function named() {
  const by = new FormData($("erase-form")).get("by");
  if (by === "subject") return { subject: $("subject").value.trim() };
  return { ids: [...new Set($("ids").value.split("\n").map((each) => each.trim()).filter(Boolean))] };
}

async function check() {
  const names = named();
  const found = await call("/requests/plan", names);
  const key = Array.from(crypto.getRandomValues(new Uint8Array(16)), (n) => n.toString(16).padStart(2, "0")).join("");
  asked = { key, body: { ...names, reason: $("reason").value.trim(), regime: $("regime").value, external_id: $("external-id").value.trim() || null, received_on: $("received-on").value || null } };
  showPlan(found);
  say("Checked: nothing was changed.", "erase-");
  $("plan").hidden = false;
  $("plan").focus();
}

function showPlan(found) {
  const served = new Map(found.served.map(({ shard, slices_served, of }) => [shard, `${slices_served} of ${of}`]));
  const rows = found.shards.map((each) => h("tr", {}, h("th", { scope: "row" }, String(each.shard)),
    h("td", { class: "number" }, String(each.first_slice)), h("td", { class: "number" }, String(each.slices_retrained)), h("td", { class: "number" }, served.get(each.shard) || "")));
  const erased = Object.entries(found.would_erase).filter(([, n]) => n).map(([name, n]) => counted(n, name.replace("_", " ").slice(0, -1)));
  fill($("plan-body"),
    h("p", {}, `${counted(found.records, "record")}${found.already_deleted ? `, and ${found.already_deleted} deleted before` : ""}.`),
    ...(rows.length ? table("plan-label", "What is retrained", ["Shard", "From slice", "Slices", "Served meanwhile"], rows, "") : []),
    facts([
      ["Share of a whole training", `${share(found.record_epochs_retrained, found.record_epochs_full)} (${found.record_epochs_retrained} of ${found.record_epochs_full} record-epochs)`],
      ["Estimated time", found.estimated_seconds === null ? "unknown" : `${found.estimated_seconds.toFixed(1)} s of one worker`],
      ["Erased at once", erased.join(", ")],
    ]),
    ...(found.copies.length ? [h("h4", {}, "Exact copies under other ids"), h("ul", {}, ...found.copies.map((each) => h("li", {}, given(each))))] : []),
    ...(found.near.length
      ? table("near-label", "Near-duplicates, which stay unless you add them", HITS, found.near.map((each, n) => hit(each, `near-${n}`)))
      : [h("p", { class: "small" }, "No near-duplicates were found.")]));
  $("copies-choice").hidden = !found.copies.length;
  $("include-copies").checked = false;
  $("send").disabled = !found.records;
}

async function send() {
  const body = { ...asked.body, include_copies: $("include-copies").checked };
  const done = await call("/requests", body, { "Idempotency-Key": asked.key });
  $("erase-form").reset();
  chooseBy();
  stale();
  await refresh();
  say(`Sent: request ${done.external_id || done.request_id} waits for a decision.`);
  $(`open-${done.request_id}`)?.focus();
}

// What was checked is not what would be sent any more.
function stale() {
  asked = null;
  fill($("erase-said"));
  $("plan").hidden = true;
}

// --- finding ---------------------------------------------------------------------------------------

const HITS = ["Record", "Likeness", "Shard", "Slice", "Subject", ""];

function hit(each, id) {
  return h("tr", {}, h("th", { scope: "row" }, given(each.id)), h("td", { class: "number" }, each.score.toFixed(3)),
    h("td", { class: "number" }, String(each.shard)), h("td", { class: "number" }, String(each.slice)),
    h("td", {}, each.subject === null ? "none" : given(each.subject)),
    h("td", {}, h("button", { type: "button", class: "quiet", id, click: () => addId(each.id), "aria-label": `Add ${each.id} to the request` }, "Add")));
}

function addId(id) {
  document.querySelector('input[name="by"][value="ids"]').checked = true;
  const ids = named().ids ?? [];
  $("ids").value = [...new Set([...ids, id])].join("\n");
  chooseBy();
  stale();
  say(`Added ${id}: check what it touches.`, "erase-");
  $("ids").focus();
}

async function find() {
  const { candidates } = await call("/find", { text: $("text").value });
  fill($("hits"), ...(candidates.length
    ? table("hits-label", "The nearest records, the most alike first", HITS, candidates.map((each, n) => hit(each, `hit-${n}`)))
    : []));
  say(`${counted(candidates.length, "record")} found.`, "find-");
}

// --- wiring ----------------------------------------------------------------------------------------

function onSubmit(id, work, where = "") {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    const control = event.submitter ?? $(id).querySelector("[type=submit]");
    attempt(control, () => work(control), where);
  });
}

fill($("legend"), ...Object.entries(SLICES).map(([name, [style, sign, meaning]]) =>
  h("li", {}, h("b", { class: style, "aria-hidden": "true" }, sign), " ", h("strong", {}, name), `: ${meaning}`)));
onSubmit("sign-in-form", () => signIn($("token").value.trim()));
onSubmit("erase-form", check, "erase-");
onSubmit("find-form", find, "find-");
onSubmit("decide-form", (control) => decide(control.value), "request-");
$("erase-form").addEventListener("input", () => (chooseBy(), stale()));
$("send").addEventListener("click", (event) => attempt(event.currentTarget, send, "erase-"));
$("run").addEventListener("click", (event) => attempt(event.currentTarget, run));
$("sign-out").addEventListener("click", () => signOut());
$("close").addEventListener("click", () => $("request").close());
$("request").addEventListener("close", closed);
$("erase-form").reset(); // a browser may restore what a reloaded page held
chooseBy();
signIn("");
