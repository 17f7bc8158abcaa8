// The scrubber's view: under the player's frames stand the segments of every head, and the robot's state. The kernel
// (scrubber.py) owns them and every edit; this draws them, and turns keys and the mouse into commands.

const OPEN = ["edited", "unfit", "outdated"]; // states of episodes that wait for a look
const SURE = 0.9; // a boundary of less confidence looks doubtful: the lowest row of notebook 02's table
const NEAR = 6; // pixels beside a boundary in which the mouse takes hold of it

const HELP_EDIT = [
  ["[ ]", "select the boundary before, after"],
  [", .", "move the selected boundary by a frame (with Shift: 10)"],
  ["b", "move the selected boundary to this frame"],
  ["s", "split: a new segment, of the subtask that follows, begins at this frame"],
  ["x", "delete the selected boundary: two segments become one"],
  ["1 … 9", "name the segment at this frame"],
  ["h", "edit the other row"],
  ["u", "undo"],
];
const HELP_VERIFY = [["a", "accept the annotation as it is"], ["f", "save the segments as a fix"], ["r", "reject the episode"]];
const HELP_MARK = [["f", "save the mark"]];

function render({ model, el }) {
  const marking = model.get("mode") === "mark", heads = Object.keys(model.get("vocabulary"));
  const page = playerPage({
    model, el, kind: "sarm-scrubber", pickedBy: ", the most suspicious first",
    help: [...HELP_EDIT, ...(marking ? HELP_MARK : HELP_VERIFY)],
  });
  const { get, command, root, tracks, time, picker, place } = page;

  // --- the page -----------------------------------------------------------------------------------------------------

  const bars = Object.fromEntries(heads.map((head) => [head, make("div", { className: "bar" })]));
  const names = make("div", { className: "row names" });
  for (const head of heads) tracks.append(label(head), bars[head]);
  const state = panelStack(page, () => {
    state.draw();
    page.drawPlayhead();
  });
  tracks.append(state.node, label("name it"), names);
  const why = make("input", { type: "text", className: "why", placeholder: "why (optional)" });
  const decide = (name) => command(name, { why: why.value });
  const verdicts = marking
    ? [button("save mark", "write the segments into the file (f)", () => decide("fix"))]
    : [
        button("accept", "the annotation is right as it is (a)", () => decide("accept")),
        button("save fix", "write the segments into the file (f)", () => decide("fix")),
        button("reject", "take the episode out of training (r)", () => decide("reject")),
      ];
  page.message.before(
    make("div", { className: "row" },
      button("split", "a new segment begins at this frame (s)", () => command("split", { frame: page.at() })),
      button("delete boundary", "the selected one (x)", () => command("merge")),
      button("undo", "take back the last edit (u)", () => command("undo")), why, ...verdicts,
      button("withdraw", "take what was said about this episode out of the file", () => command("withdraw"))),
  );

  // --- the segments -------------------------------------------------------------------------------------------------

  let drag = null; // {index of the boundary or -1, frame at which it is}

  function drawBar(head, preview) {
    const bar = bars[head], active = head === get("head");
    const segments = get("segments")[head].map((segment) => [...segment]);
    const edges = get("boundaries")[head].map((boundary) => [...boundary]);
    if (preview) {
      const edge = edges[preview.index];
      edge[0] = preview.at;
      if (edge[3] !== null) segments[edge[3]][2] = preview.at - 1;
      if (edge[4] !== null) segments[edge[4]][1] = preview.at;
    }
    bar.classList.toggle("active", active);
    bar.replaceChildren();
    for (const [name, start, end] of segments) {
      const colour = colourOf(head, name), seconds = ((end - start + 1) / get("fps")).toFixed(2);
      const called = name || "not marked yet", title = `${called}: frames ${start} to ${end} (${seconds} s)`;
      const box = make("div", { className: "segment", title }, name ? name : `${called}: split (s) where the second subtask begins`);
      Object.assign(box.style, { left: `${place(start)}%`, width: `${place(end + 1) - place(start)}%` });
      Object.assign(box.style, { background: colour, color: readableOn(colour) });
      bar.append(box);
    }
    edges.forEach(([at, , , , , confidence], i) => {
      const line = make("div", { className: "boundary" });
      line.classList.toggle("selected", active && (preview ? preview.index : get("selected")) === i);
      line.classList.toggle("doubtful", confidence !== null && confidence < SURE);
      line.style.left = `${place(at)}%`;
      bar.append(line);
    });
    bar.append(make("div", { className: "playhead" }));
  }

  const drawBars = () => heads.forEach((head) => drawBar(head));

  const colourOf = (head, name) => {
    const i = get("vocabulary")[head].indexOf(name);
    return i < 0 ? "#777777" : get("colours")[i % get("colours").length];
  };

  function readableOn(colour) {
    const [r, g, b] = [1, 3, 5].map((i) => (parseInt(colour.slice(i, i + 2), 16) / 255) ** 2.2);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.19 ? "#111" : "#fff"; // of more contrast, as charts.py has it
  }

  // The mouse on a bar: near a boundary it moves that, elsewhere it moves the playhead.
  for (const head of heads) {
    const bar = bars[head];
    const frameAt = (event) => page.frameAt(event, bar);
    const boundaryAt = (event) => {
      const [from, to] = page.span(), pixel = (to - from) / bar.getBoundingClientRect().width, here = frameAt(event);
      const distances = get("boundaries")[head].map(([at]) => Math.abs(at - here) / pixel);
      const nearest = distances.indexOf(Math.min(...distances));
      return distances[nearest] <= NEAR ? nearest : -1;
    };
    const follow = (event) => {
      if (drag.index < 0) return page.go(Math.floor(frameAt(event)));
      const [, low, high] = get("boundaries")[head][drag.index];
      drag.at = clamp(Math.round(frameAt(event)), low, high);
      drawBar(head, drag);
      page.go(drag.at);
    };
    bar.onpointerdown = (event) => {
      if (event.button !== 0) return;
      drag = { index: boundaryAt(event), at: null };
      bar.setPointerCapture(event.pointerId);
      if (head !== get("head")) command("activate", { head });
      if (drag.index < 0) follow(event);
      else drag.at = get("boundaries")[head][drag.index][0];
    };
    bar.onpointermove = (event) => {
      if (drag) follow(event);
      else bar.style.cursor = boundaryAt(event) < 0 ? "pointer" : "col-resize";
    };
    bar.onpointerup = bar.onpointercancel = () => {
      if (drag && drag.index >= 0) command("move", { head, boundary: drag.index, at: drag.at });
      drag = null;
    };
  }

  // --- drawing what the kernel says ---------------------------------------------------------------------------------

  function drawPlayhead(frame) {
    for (const head of heads) bars[head].lastChild.style.left = `${place(frame + 0.5)}%`;
    const here = heads.map((head) => get("segments")[head].find(([, start, end]) => start <= frame && frame <= end));
    const said = here.map((segment) => (segment && segment[0]) || "—").join(" / ");
    state.playhead(frame);
    time.textContent = `${frame} of ${get("length") - 1} · ${page.clock(frame)} · ${said}`;
  }

  function draw() {
    const states = get("states"), rows = get("picker");
    rows.forEach(([i], row) => {
      const text = states[i] ? `episode ${i} · ${states[i]}` : `episode ${i}`;
      if (picker.options[row].textContent !== text) picker.options[row].textContent = text;
    });
    const done = rows.filter(([i]) => states[i] && !OPEN.includes(states[i].split(", ")[0])).length;
    const drafts = rows.filter(([i]) => states[i]?.endsWith("edited")).length;
    page.count.append(`, ${done} done${drafts ? `, ${drafts} edited and not saved` : ""}`);
    if (!drag) drawBars();
    const head = get("head");
    names.replaceChildren();
    get("vocabulary")[head].forEach((name, i) => {
      const chip = button(i < 9 ? `${i + 1} ${name}` : name, "name the segment at this frame", () => rename(i + 1));
      chip.style.borderLeftColor = colourOf(head, name);
      names.append(chip);
    });
    root.dataset.state = states[get("episode")] ?? "";
  }

  const typed = new Map(); // reasons that were not saved, by episode: they wait for the person to come back
  why.addEventListener("input", () => typed.set(get("episode"), why.value));
  const sign = () => {
    if (typed.get(get("episode")) === get("why")) typed.delete(get("episode")); // it is saved
    why.value = typed.get(get("episode")) ?? get("why");
  };

  // --- keys ---------------------------------------------------------------------------------------------------------

  const rename = (number) => command("rename", { frame: page.at(), number });
  const numbers = Array.from({ length: 9 }, (_, i) => [String(i + 1), () => rename(i + 1)]);
  const keys = {
    ...Object.fromEntries(numbers),
    "[": () => command("select", { step: -1, frame: page.at() }),
    "]": () => command("select", { step: 1, frame: page.at() }),
    ",": () => command("nudge", { by: -1 }),
    ".": () => command("nudge", { by: 1 }),
    "<": () => command("nudge", { by: -10 }),
    ">": () => command("nudge", { by: 10 }),
    b: () => command("put", { frame: page.at() }),
    s: () => command("split", { frame: page.at() }),
    x: () => command("merge"),
    h: () => command("activate", { head: heads[(heads.indexOf(get("head")) + 1) % heads.length] }),
    u: () => command("undo"),
    f: () => decide("fix"),
    ...(marking ? {} : { a: () => decide("accept"), r: () => decide("reject") }),
  };

  const stop = page.start(
    {
      began() {
        state.began();
        sign();
      },
      spanned() {
        state.draw();
        drawBars();
      },
      drawn: draw, playhead: drawPlayhead, message: state.receive, busy: () => drag || state.busy(),
      status: () => get("status"), keys, fields: [why],
    },
    ["segments", "boundaries", "selected", "head", "states", "status"],
  );
  ["change:why", "change:states"].forEach((said) => model.on(said, sign));
  return () => {
    stop();
    state.stop();
    ["change:why", "change:states"].forEach((said) => model.off(said, sign));
  };
}

export default { render };
