"use strict";
// What opens of one run: its facts, command, log and record.

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function fileLink(run, file) {
  const path = [
    DATA.root,
    ...run.folder
      .split("/")
      .filter((part) => part !== ".")
      .map(encodeURIComponent),
    file,
  ].join("/");
  return el("a", { href: path }, file);
}

async function open(run) {
  id("detail-title").textContent = nameOf(run);
  const facts = {
    status: run.status + (run.message ? `: ${run.message}` : ""),
    network: run.prunes ? DATA.networks[run.network].name : run.family,
    "loss before": short(run.lossBefore),
    "loss after pruning": short(run.lossAfter),
    "test error after pruning": percent(run.errorPruned),
    "test error, best network": percent(run.error),
    "epochs trained": run.epochs,
    seconds: short(run.seconds),
  };
  const command = el("pre", { class: "command", id: "detail-command" }, run.command);
  const copy = el(
    "button",
    {
      type: "button",
      onclick: () =>
        navigator.clipboard?.writeText(run.command).then(() => {
          copy.textContent = "Copied";
        }),
    },
    "Copy",
  );
  id("detail-body").replaceChildren(
    el(
      "dl",
      { class: "facts" },
      ...Object.entries(facts).map(([name, value]) =>
        el("div", {}, el("dt", {}, name), el("dd", {}, String(value))),
      ),
    ),
    el("h3", {}, "Command"),
    command,
    copy,
    ...(DATA.root === null
      ? []
      : [
          el("h3", {}, "Files"),
          el("p", {}, fileLink(run, DATA.files.log), " · ", fileLink(run, DATA.files.record)),
        ]),
  );
  id("detail").showModal();
  const packed = id(`detail-${run.id}`);
  if (!packed || typeof DecompressionStream === "undefined") {
    id("detail-body").append(
      el(
        "p",
        { class: "note" },
        "The page holds the logs and records of the first runs only, to stay small" +
          (DATA.root === null ? "." : "; the files above hold this one’s."),
      ),
    );
    return;
  }
  const texts = await unpack(packed.textContent.trim());
  id("detail-body").append(
    el("h3", {}, "Log"),
    el("pre", { id: "detail-log", tabindex: "0" }, texts.log),
    el("h3", {}, "Record"),
    el("pre", { id: "detail-record", tabindex: "0" }, texts.record),
  );
}
