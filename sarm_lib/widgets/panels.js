// Panels of curves under a player's frames, with the playhead through all of them: the explorer's, and the scrubber's state.
// This file stands behind player.js and before theirs, in one module. The kernel (panels.py) sends {episode, panels}, one
// buffer of float32 a panel.

const MARGIN = 4; // pixels over and under lines, so that 0 and 1 are seen whole

const written = (value, digits) => value.toFixed(digits).replace("-", "−");

// --- curves ---------------------------------------------------------------------------------------------------------

// Frames [from, to) in as many groups as there are pixels, or one each: an episode of 10,000 frames draws as fast as
// one of 500.
function columns(from, to, pixels) {
  const count = clamp(Math.floor(pixels), 1, to - from);
  const edge = (i) => from + Math.floor((i * (to - from)) / count);
  return Array.from({ length: count }, (_, i) => [edge(i), edge(i + 1)]);
}

// A line keeps the extremes of every pixel: a peak of one frame stays in sight.
function drawLine(context, values, groups, x, y) {
  context.beginPath();
  for (const [from, to] of groups) {
    const at = x((from + to) / 2), [first, last] = [values[from], values[to - 1]];
    let low = first, high = first;
    for (let i = from + 1; i < to; i++) {
      low = Math.min(low, values[i]);
      high = Math.max(high, values[i]);
    }
    for (const value of to - from > 1 ? [first, low, high, last] : [first]) context.lineTo(at, y(value));
  }
  context.stroke();
}

// Stacked areas show the mean of every pixel's frames, whose sum is that of the frames.
function drawAreas(context, curves, colours, groups, x, y) {
  const places = groups.map(([from, to]) => x((from + to) / 2));
  places[0] = x(groups[0][0]); // to both ends of the plot, not from the middle of the first frame
  places.push(x(groups.at(-1)[1]));
  let below = places.map(() => 0);
  curves.forEach((values, k) => {
    const above = groups.map(([from, to], i) => {
      let sum = 0;
      for (let j = from; j < to; j++) sum += values[j];
      return below[i] + sum / (to - from);
    });
    above.push(above.at(-1));
    context.beginPath();
    places.forEach((at, i) => context.lineTo(at, y(above[i])));
    for (let i = places.length - 1; i >= 0; i--) context.lineTo(places[i], y(below[i]));
    context.fillStyle = context.strokeStyle = colours[k];
    context.fill();
    context.lineWidth = 0.5; // no seam between two areas
    context.stroke();
    below = above;
  });
}

function niceTicks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((s) => s * power >= rough * 0.999) ?? 10), first = Math.ceil(low / step - 1e-6);
  const count = Math.floor(high / step + 1e-6) - first + 1;
  const digits = clamp(-Math.floor(Math.log10(step) + 1e-6), 0, 6);
  return Array.from({ length: count }, (_, i) => [(first + i) * step, written((first + i) * step, digits)]);
}

// --- the panels of the shown episode ----------------------------------------------------------------------------------
// `changed()` draws what is shown again; the view calls `began` for another episode, `receive` with its panels, `draw` when
// frames or sizes are others, and `playhead(frame)`, which returns the most probable stage of every stack of areas.

function panelStack(page, changed) {
  const { get, root, place } = page;
  const node = make("div", { className: "panels" });
  const alone = new Set(); // curves that somebody picked: the others of their panel are pale, in the next episode too
  const sized = new ResizeObserver(() => {
    draw();
    page.drawPlayhead();
  });
  let panels = [], dragging = false;

  function began() {
    panels = []; // the old ones stay on the page, pale, until the new ones arrive: nothing jumps
    root.classList.add("waiting");
    page.command("send_panels", { episode: get("episode") });
  }

  function receive(content, buffers) {
    if (content.episode !== get("episode")) return;
    const scrolled = [...node.querySelectorAll(".head")].map((head) => head.scrollTop);
    panels = content.panels.map((spec, i) => build(spec, buffers[i]));
    node.replaceChildren(...panels.flatMap(({ head, ticks, plot }) => [head, ticks, plot]));
    panels.forEach(({ head }, i) => (head.scrollTop = scrolled[i] ?? 0)); // sixty joints: the same ones stay in sight
    sized.disconnect();
    panels.forEach(({ plot }) => sized.observe(plot));
    root.style.setProperty("--panels", Math.max(1, panels.length));
    root.classList.remove("waiting");
    root.dataset.panels = content.episode;
    changed();
  }

  function build(spec, buffer) {
    const { buffer: whole = buffer, byteOffset: start = 0, byteLength } = buffer; // a DataView, or an ArrayBuffer
    const values = new Float32Array(whole.slice(start, start + byteLength)), length = values.length / spec.names.length;
    const curves = spec.names.map((_, k) => values.subarray(k * length, (k + 1) * length)), lines = spec.kind === "lines";
    const margin = lines ? MARGIN : 0; // and what leaves the domain stays at its edge: the readout has its value
    const y = (k, value, tall) => {
      const [low, high] = spec.domains[k];
      return margin + (tall - 2 * margin) * clamp((high - value) / (high - low), 0, 1);
    };
    const canvas = make("canvas"), playhead = make("div", { className: "playhead" });
    const plot = make("div", { className: `plot ${spec.kind}` });
    const ticks = make("div", { className: `ticks ${spec.kind}` });
    const [low, high] = spec.domains[0];
    for (const [value, text] of spec.shared ? niceTicks(low, high, 3) : []) {
      const top = `calc(${margin}px + (100% - ${2 * margin}px) * ${(high - value) / (high - low)})`;
      const grid = make("div", { className: "grid" }), tick = make("span", {}, text);
      grid.style.top = tick.style.top = top;
      plot.append(grid);
      ticks.append(tick);
    }
    const head = make("div", { className: `head ${spec.kind}` }, make("span", { className: "title" }, spec.title));
    const entries = spec.names.map((name, k) => {
      const swatch = make("i", { className: spec.dashed.includes(name) ? "dashed" : "" });
      swatch.style.color = spec.colours[k];
      return make("span", { className: "curve" }, swatch, name, make("b"));
    });
    head.append(...entries);
    const dots = lines ? spec.names.map(() => make("div", { className: "dot" })) : [];
    dots.forEach((dot, k) => (dot.style.background = spec.colours[k]));
    plot.append(canvas, playhead, ...dots.toReversed()); // the first curve is on top
    follow(plot);
    const panel = { ...spec, curves, lines, y, canvas, playhead, plot, ticks, head, entries, dots };
    if (lines && entries.length > 1) pickable(panel);
    return panel;
  }

  const picked = ({ title, names }, k) => JSON.stringify([title, names[k]]);
  const pale = (panel, k) => !alone.has(picked(panel, k)) && panel.names.some((_, i) => alone.has(picked(panel, i)));

  // A click on a curve's name leaves it alone, further ones add others; of fourteen joints nobody sees one.
  function pickable(panel) {
    const mark = () => panel.entries.forEach((entry, k) => {
      entry.classList.toggle("pale", pale(panel, k));
      panel.dots[k].hidden = pale(panel, k);
    });
    panel.entries.forEach((entry, k) => {
      entry.classList.add("pickable");
      entry.title = "click: this one alone; click others to add them, or this one again for all";
      entry.onclick = () => {
        if (!alone.delete(picked(panel, k))) alone.add(picked(panel, k));
        mark();
        draw();
      };
    });
    mark();
  }

  function draw() {
    const [from, to] = page.span(), sharp = window.devicePixelRatio || 1;
    for (const panel of panels) {
      const { names, curves, colours, dashed, lines, y, canvas, plot } = panel;
      const wide = plot.clientWidth, tall = plot.clientHeight;
      if (!wide) continue; // in a hidden tab: drawn when it gets a size
      Object.assign(canvas, { width: Math.round(wide * sharp), height: Math.round(tall * sharp) });
      const context = canvas.getContext("2d");
      context.scale(canvas.width / wide, canvas.height / tall);
      context.lineJoin = "round";
      const x = (at) => (wide * (at - from)) / (to - from), of = (k) => (value) => y(k, value, tall);
      // One frame more on both sides: zoomed in, curves go on to the edge.
      const groups = columns(Math.max(0, from - 1), Math.min(curves[0].length, to + 1), wide);
      if (!lines) {
        drawAreas(context, curves, colours, groups, x, of(0));
        continue;
      }
      context.lineWidth = 2;
      for (let k = curves.length - 1; k >= 0; k--) {
        context.strokeStyle = colours[k];
        context.globalAlpha = pale(panel, k) ? 0.15 : 1;
        context.setLineDash(dashed.includes(names[k]) ? [6, 4] : []);
        drawLine(context, curves[k], groups, x, of(k));
      }
    }
  }

  function playhead(frame) {
    const at = place(frame + 0.5), stages = [];
    for (const { names, curves, domains, lines, y, playhead: bar, plot, entries, dots } of panels) {
      const values = curves.map((curve) => curve[frame]);
      const most = lines ? -1 : values.indexOf(Math.max(...values));
      if (!lines) stages.push(names[most]);
      entries.forEach((entry, k) => {
        const [low, high] = domains[k], digits = clamp(2 - Math.floor(Math.log10(high - low)), 0, 4);
        entry.lastChild.textContent = written(values[k], digits);
        entry.classList.toggle("most", k === most);
      });
      bar.style.left = `${at}%`;
      const tops = values.map((value, k) => `${y(k, value, plot.clientHeight)}px`);
      dots.forEach((dot, k) => Object.assign(dot.style, { left: `${at}%`, top: tops[k] }));
    }
    return stages;
  }

  function follow(plot) {
    const toMouse = (event) => page.go(Math.floor(page.frameAt(event, plot)));
    plot.onpointerdown = (event) => {
      if (event.button !== 0) return;
      dragging = true;
      plot.setPointerCapture(event.pointerId);
      toMouse(event);
    };
    plot.onpointermove = (event) => dragging && toMouse(event);
    plot.onpointerup = plot.onpointercancel = () => (dragging = false);
  }

  return { node, began, receive, draw, playhead, busy: () => dragging, stop: () => sized.disconnect() };
}
