"use strict";
(() => {
  const items = [...document.querySelectorAll(".item")];
  const controls = document.querySelector(".controls");
  if (controls) {
    const [search, status, round, toggle, count] = ["search", "status", "round", "toggle", "count"].map((id) => document.getElementById(id));
    const texts = items.map((item) => item.textContent.toLowerCase());
    const apply = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      items.forEach((item, index) => {
        const fits = (!status.value || item.dataset.status === status.value) && (!round || !round.value || item.dataset.round === round.value) && words.every((word) => texts[index].includes(word));
        item.hidden = !fits;
        shown += fits;
      });
      count.textContent = `${shown} of ${items.length} shown`;
    };
    [search, status, round].forEach((control) => control && control.addEventListener("input", apply));
    toggle.addEventListener("click", () => {
      const open = toggle.textContent === "Open all";
      items.forEach((item) => { if (!item.hidden) item.open = open; });
      toggle.textContent = open ? "Close all" : "Open all";
    });
    controls.hidden = false;
    apply();
  }

  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const format = (value, chart) => (chart.percent ? `${(100 * value).toFixed(Math.max(1, chart.digits - 3))} %` : Number(value.toPrecision(chart.digits)).toString()).replace("-", "−");
  for (const [id, chart] of Object.entries(charts)) {
    const figure = document.getElementById(id);
    const svg = figure.querySelector("svg");
    const readout = figure.querySelector("output");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    line.setAttribute("class", "crosshair");
    svg.append(line);
    svg.setAttribute("tabindex", "0");
    const steps = [...new Set(chart.series.flatMap((series) => series.x))].sort((a, b) => a - b);
    let at = steps.length - 1;
    const show = () => {
      const x = steps[at];
      const px = chart.left + ((x - chart.x0) / (chart.x1 - chart.x0)) * (chart.right - chart.left);
      line.setAttribute("d", `M${px.toFixed(1)} ${chart.top}V${chart.bottom}`);
      readout.replaceChildren();
      const step = document.createElement("span");
      step.textContent = `step ${Math.round(x)}`;
      readout.append(step);
      for (const series of chart.series) {
        let best = 0;
        series.x.forEach((value, index) => { if (Math.abs(value - x) < Math.abs(series.x[best] - x)) best = index; });
        const entry = document.createElement("span");
        const dot = document.createElement("i");
        const value = document.createElement("b");
        entry.className = `s${series.style}`;
        value.textContent = format(series.y[best], chart);
        entry.append(dot, `${series.name} `, value);
        readout.append(entry);
      }
      readout.hidden = false;
    };
    const hide = () => { line.removeAttribute("d"); readout.hidden = true; };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = chart.x0 + ((((event.clientX - box.left) / box.width) * chart.width - chart.left) / (chart.right - chart.left)) * (chart.x1 - chart.x0);
      at = 0;
      steps.forEach((value, index) => { if (Math.abs(value - x) < Math.abs(steps[at] - x)) at = index; });
      show();
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("focus", show);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      at = Math.min(steps.length - 1, Math.max(0, at + move));
      show();
    });
  }
})();
