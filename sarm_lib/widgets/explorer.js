// The explorer's view: under the player's frames stand panels of curves, with the playhead through all of them. Beside what
// the player asks for, the kernel (explorer.py) sends panels: {episode, panels}, one buffer of float32 a panel.

const MARGIN = 4; // pixels over and under lines, so that 0 and 1 are seen whole
const SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600];

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

function render({ model, el }) {
  const page = playerPage({ model, el, kind: "sarm-explorer", help: [] });
  const { get, root, tracks, time, place, clock } = page;
  const stack = make("div", { className: "panels" });
  const axis = make("div", { className: "axis" });
  const tag = make("div", { className: "tag" });
  tracks.append(stack, make("span", { className: "label unit" }, "s"), axis);

  // --- panels -------------------------------------------------------------------------------------------------------

  let panels = []; // of the shown episode

  function receivePanels(content, buffers) {
    if (content.episode !== get("episode")) return;
    panels = content.panels.map((spec, i) => build(spec, buffers[i]));
    stack.replaceChildren(...panels.flatMap(({ head, ticks, plot }) => [head, ticks, plot]));
    root.style.setProperty("--panels", Math.max(1, panels.length));
    root.classList.remove("waiting");
    root.dataset.panels = content.episode;
    drawCurves();
    page.drawPlayhead();
  }

  function build(spec, buffer) {
    const { buffer: whole = buffer, byteOffset: start = 0, byteLength } = buffer; // a DataView, or an ArrayBuffer
    const values = new Float32Array(whole.slice(start, start + byteLength)), length = values.length / spec.names.length;
    const curves = spec.names.map((_, k) => values.subarray(k * length, (k + 1) * length));
    const [low, high] = spec.domain, lines = spec.kind === "lines";
    const margin = lines ? MARGIN : 0; // and what leaves the domain stays at its edge: the readout has its value
    const y = (value, tall) => margin + (tall - 2 * margin) * clamp((high - value) / (high - low), 0, 1);
    const canvas = make("canvas"), playhead = make("div", { className: "playhead" });
    const plot = make("div", { className: `plot ${spec.kind}` });
    const ticks = make("div", { className: `ticks ${spec.kind}` });
    for (const [value, text] of niceTicks(low, high, 3)) {
      const top = `calc(${margin}px + (100% - ${2 * margin}px) * ${(high - value) / (high - low)})`;
      const grid = make("div", { className: "grid" }), tick = make("span", {}, text);
      grid.style.top = tick.style.top = top;
      plot.append(grid);
      ticks.append(tick);
    }
    const head = make("div", { className: `head ${spec.kind}` }, make("span", { className: "title" }, spec.title));
    const readings = spec.names.map((name, k) => {
      const swatch = make("i", { className: spec.dashed.includes(name) ? "dashed" : "" }), reading = make("b");
      swatch.style.color = spec.colours[k];
      head.append(make("span", { className: "curve" }, swatch, name, reading));
      return reading;
    });
    const dots = lines ? spec.names.map(() => make("div", { className: "dot" })) : [];
    dots.forEach((dot, k) => (dot.style.background = spec.colours[k]));
    plot.append(canvas, playhead, ...dots.toReversed()); // the first curve is on top
    follow(plot);
    return { ...spec, curves, lines, y, canvas, playhead, plot, ticks, head, readings, dots };
  }

  function drawCurves() {
    const [from, to] = page.span(), sharp = window.devicePixelRatio || 1;
    for (const { names, curves, colours, dashed, lines, y, canvas, plot } of panels) {
      const wide = plot.clientWidth, tall = plot.clientHeight;
      if (!wide) continue; // in a hidden tab: drawn when it gets a size
      Object.assign(canvas, { width: Math.round(wide * sharp), height: Math.round(tall * sharp) });
      const context = canvas.getContext("2d");
      context.scale(canvas.width / wide, canvas.height / tall);
      context.lineJoin = "round";
      const x = (at) => (wide * (at - from)) / (to - from), of = (value) => y(value, tall);
      // One frame more on both sides: zoomed in, curves go on to the edge.
      const groups = columns(Math.max(0, from - 1), Math.min(curves[0].length, to + 1), wide);
      if (!lines) {
        drawAreas(context, curves, colours, groups, x, of);
        continue;
      }
      context.lineWidth = 2;
      for (let k = curves.length - 1; k >= 0; k--) {
        context.strokeStyle = colours[k];
        context.setLineDash(dashed.includes(names[k]) ? [6, 4] : []);
        drawLine(context, curves[k], groups, x, of);
      }
    }
    drawAxis();
  }

  function drawAxis() {
    const [from, to] = page.span().map((at) => at / get("fps")), most = Math.max(2, axis.clientWidth / 64);
    const step = SECONDS.find((s) => (to - from) / s <= most) ?? (to - from) / 4;
    const digits = step < 0.1 ? 2 : step < 1 ? 1 : 0;
    axis.replaceChildren();
    for (let i = Math.ceil(from / step - 1e-6); i * step < to; i++) {
      const tick = make("span", {}, (i * step).toFixed(digits));
      tick.style.left = `${place(i * step * get("fps") + 0.5)}%`; // the middle of its frame, as for the playhead
      axis.append(tick);
    }
    axis.append(tag);
  }

  function drawPlayhead(frame) {
    const at = place(frame + 0.5), stages = [];
    for (const { names, curves, domain, lines, y, playhead, plot, readings, dots } of panels) {
      const values = curves.map((curve) => curve[frame]);
      const digits = clamp(2 - Math.floor(Math.log10(domain[1] - domain[0])), 0, 4);
      const most = lines ? -1 : values.indexOf(Math.max(...values));
      if (!lines) stages.push(names[most]);
      readings.forEach((reading, k) => {
        reading.textContent = written(values[k], digits);
        reading.parentNode.classList.toggle("most", k === most);
      });
      playhead.style.left = `${at}%`;
      const tops = values.map((value) => `${y(value, plot.clientHeight)}px`);
      dots.forEach((dot, k) => Object.assign(dot.style, { left: `${at}%`, top: tops[k] }));
    }
    const stage = make("span", { className: "stage" }, ...stages.map((name) => ` · ${name}`));
    time.replaceChildren(`${frame} of ${get("length") - 1} · ${clock(frame)}`, stage);
    tag.textContent = [clock(frame), ...stages].join(" · ");
    const within = clamp(at, 0, 100); // at the left end it stands right of the playhead, at the right end left of it
    Object.assign(tag.style, { left: `${within}%`, transform: `translateX(-${within}%)` });
  }

  let dragging = false;

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

  function began() {
    panels = []; // the old ones stay on the page, pale, until the new ones arrive: nothing jumps
    root.classList.add("waiting");
    page.command("send_panels", { episode: get("episode") });
  }

  const stop = page.start({ began, spanned: drawCurves, playhead: drawPlayhead, message: receivePanels, busy: () => dragging });
  const sized = new ResizeObserver(() => {
    root.classList.toggle("narrow", axis.clientWidth < 400);
    drawCurves();
    page.drawPlayhead();
  });
  sized.observe(axis); // as wide as every plot
  return () => {
    stop();
    sized.disconnect();
  };
}

export default { render };
