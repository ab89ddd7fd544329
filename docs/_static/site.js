// Draws every figure of a page in the theme's colours, again when the theme changes, loading Plotly only where there is one; makes tables sort.
(() => {
  const here = document.currentScript.src;
  const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = () => document.documentElement.dataset.theme === "dark";
  const BLACK = new Set(["#000", "#000000", "black", "rgb(0,0,0)", "rgb(0, 0, 0)"]);

  // Black is the eighth Okabe-Ito colour and vanishes on a dark page: it stands for "the colour of text".
  const inked = (value, ink) =>
    typeof value === "string" ? (BLACK.has(value.toLowerCase()) ? ink : value)
    : Array.isArray(value) ? value.map(v => inked(v, ink))
    : value && typeof value === "object" && !ArrayBuffer.isView(value)
      ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, k === "bdata" ? v : inked(v, ink)])) : value;

  const themed = fig => {
    const ink = style("--pst-color-text-base"), faint = style("--pst-color-border"), paper = style("--pst-color-background");
    const { data, layout } = inked(fig, ink);
    const axis = { gridcolor: faint, zerolinecolor: faint, linecolor: ink, tickcolor: ink, automargin: true, ticks: "outside" };
    const template = { layout: {
      font: { color: ink, family: style("--pst-font-family-base"), size: 14 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: layout.colorway,
      title: { x: 0, xref: "container", xanchor: "left", font: { size: 17 } },
      xaxis: axis, yaxis: axis, hoverlabel: { bgcolor: paper, bordercolor: ink, font: { color: ink } },
      colorscale: { sequential: "Viridis", sequentialminus: "Viridis" }, legend: { bgcolor: "rgba(0,0,0,0)" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--pst-color-text-muted"), activecolor: ink },
    }, data: { table: [{ header: { fill: { color: faint }, font: { color: ink } }, cells: { fill: { color: paper }, font: { color: ink } } }] } };
    const own = structuredClone(layout);
    for (const key of ["paper_bgcolor", "plot_bgcolor"]) if (/^(white|#fff(fff)?)$/i.test(own[key] || "")) delete own[key];
    delete own.width;
    return { data, layout: { ...own, template, colorway: layout.colorway, autosize: true } };
  };

  const fold = (text, width) => {  // long titles wrap instead of running out of a narrow page
    const lines = [""];
    for (const word of text.split(" ")) (lines.at(-1) + word).length > width ? lines.push(word) : lines.push((lines.pop() + " " + word).trim());
    return lines.join("<br>");
  };

  const draw = (figure, fig) => {
    const canvas = figure.querySelector(".plot-canvas"), { data, layout } = themed(fig);
    const width = canvas.clientWidth, narrow = width < 560, entries = data.filter(t => t.name && t.showlegend !== false).length;
    const title = typeof layout.title === "string" ? { text: layout.title } : layout.title;
    let lines = 1;
    if (title?.text) {  // room beside the title for the buttons, which narrow pages go without
      const letters = Math.max(24, Math.floor((width - (narrow ? 0 : 220)) / (narrow ? 9.4 : 8.6)));
      layout.title = { ...title, text: title.text.split("<br>").map(line => fold(line, letters)).join("<br>") };
      lines = layout.title.text.split("<br>").length;
    }
    const margin = { ...layout.margin };
    if (lines > 1) margin.t = (margin.t ?? 80) + 20 * (lines - 1);
    if (narrow && entries > 1 && layout.showlegend !== false) {  // the legend between title and plot, and the figure as much taller
      layout.legend = { ...layout.legend, orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", yref: "paper", xref: "paper" };
      margin.t = 30 + 22 * lines + 24 * entries;
      layout.height = (layout.height ?? 450) + 24 * entries + 60;
    }
    if (narrow) {  // all of the width for the plot; the first line of the title a line's height below the edge
      if (!Object.keys(layout).some(k => k.startsWith("yaxis") && layout[k].side === "right")) margin.r = Math.min(margin.r ?? 80, 16);
      layout.title = { ...layout.title, y: 1 - 22 / (layout.height ?? 450), yref: "container", yanchor: "top" };
    }
    const tall = narrow ? [...new Set(data.flatMap(t => Array.isArray(t.x) ? t.x : []))].filter(v => typeof v === "string" && v.includes("<br>")) : [];
    if (tall.length) layout.xaxis = { ...layout.xaxis, tickmode: "array", tickvals: tall, ticktext: tall.map(v => v.split("<br>")[0]) };  // the pointer and the table still tell all
    if (Object.keys(margin).length) layout.margin = margin;
    return Plotly.react(canvas, structuredClone(data), layout,
      { responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "", displayModeBar: narrow ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d"] });
  };

  // The table behind a figure is made from what Plotly drew, when somebody opens it.
  const columns = trace => trace.type === "sankey"
    ? [["from", trace.link.source.map(i => trace.node.label[i])], ["to", trace.link.target.map(i => trace.node.label[i])], ["value", trace.link.value]]
    : [["x", trace.x], ["y", trace.y], ["z", trace.z], ["label", trace.labels], ["value", trace.values], ["text", trace.type === "scatter" ? null : trace.text]]
      .concat(trace.error_y?.array ? [["± y", trace.error_y.array]] : []).filter(([, v]) => v && v.length && typeof v !== "string");
  const number = v => typeof v === "number" ? (Number.isInteger(v) ? String(v) : v.toPrecision(5)) : Array.isArray(v) || ArrayBuffer.isView(v) ? [...v].map(number).join(" ") : String(v ?? "").replace(/<[^>]+>/g, " ");
  const axisName = (layout, key, fallback) => (layout[key]?.title?.text || fallback).replace(/<[^>]+>/g, " ");
  const tabulate = (details, canvas) => {
    const full = canvas._fullData.map((t, i) => ({ ...canvas.data[i], ...{ name: t.name, x: t.x, y: t.y, z: t.z, type: t.type, visible: t.visible } }))
      .filter(t => t.visible !== false);  // of a figure with a menu, what it shows
    const table = document.createElement("table");
    table.className = "table";
    details.querySelector("table")?.remove();
    for (const trace of full) {
      const cols = columns(trace);
      if (!cols.length) continue;
      const caption = trace.showlegend === false ? "" : trace.name || "", rows = Math.min(200, Math.max(...cols.map(([, v]) => v.length)));
      const head = table.createTHead().insertRow();
      for (const [name] of cols) {
        const th = document.createElement("th");
        th.scope = "col";
        th.textContent = name === "x" ? axisName(canvas.layout, "xaxis", "x") : name === "y" ? axisName(canvas.layout, "yaxis", caption || "y") : name;
        head.append(th);
      }
      const body = document.createElement("tbody");
      if (full.length > 1 && caption) {
        const row = body.insertRow(), th = document.createElement("th");
        th.colSpan = cols.length; th.scope = "rowgroup"; th.textContent = caption; row.append(th);
      }
      for (let i = 0; i < rows; i++) { const row = body.insertRow(); for (const [, v] of cols) row.insertCell().textContent = number(v[i]); }
      if (table.tBodies.length && table.tHead.rows.length > 1 && table.tHead.rows[0].textContent === head.textContent) head.remove();
      table.append(body);
    }
    details.append(table);
  };

  const figures = [...document.querySelectorAll("figure.plot")];
  for (const figure of figures) {
    const json = figure.querySelector(".plot-json"), details = figure.querySelector(".plot-table");
    figure.fig = JSON.parse(json.textContent);
    details.addEventListener("toggle", () => { if (details.open) tabulate(details, figure.querySelector(".plot-canvas")); });
  }
  if (figures.length) {
    const script = document.createElement("script");
    script.src = new URL("plotly.min.js", here).href;
    script.onload = () => {
      const all = () => figures.forEach(f => draw(f, f.fig));
      all();
      new MutationObserver(all).observe(document.documentElement, { attributeFilter: ["data-theme"] });
      document.documentElement.dataset.figures = "drawn";
    };
    document.head.append(script);
  }

  // Text in a data frame stands left and without quotes; a table drawn with lines keeps its lines.
  for (const td of document.querySelectorAll("table.dataframe td")) {
    if (/^".*"$/s.test(td.textContent) && !td.children.length) { td.textContent = td.textContent.slice(1, -1); td.classList.add("text"); }
  }
  for (const pre of document.querySelectorAll("div.cell_output pre")) if (/[┌┏╭]/.test(pre.textContent)) pre.classList.add("drawn");

  // Tables of facts and data frames sort by a click on a column's head, and again the other way; a table with merged cells stays as it is.
  const value = cell => {
    const text = cell.textContent.trim().replace(/[,\u202f]/g, "").replace("−", "-"), n = parseFloat(text);
    return /^[-+]?[\d.]/.test(text) && !Number.isNaN(n) ? n : text;
  };
  const compare = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  const sortBy = (table, th, k) => {
    const down = th.ariaSort === "ascending", body = table.tBodies[0];
    for (const other of th.parentElement.cells) other.removeAttribute("aria-sort");
    th.ariaSort = down ? "descending" : "ascending";
    body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * compare(value(a.cells[k]), value(b.cells[k]))));
  };
  for (const table of document.querySelectorAll("table.facts, table.dataframe")) {
    const head = table.tHead?.rows[0], body = table.tBodies[0];
    if (!head || !body || body.rows.length < 3 || table.querySelector("[colspan], [rowspan]") || [...table.rows].some(r => r.cells.length !== head.cells.length)) continue;
    [...head.cells].forEach((th, k) => {
      if (!th.textContent.trim()) return;
      const button = document.createElement("button");
      button.type = "button"; button.className = "sort"; button.append(...th.childNodes);
      button.addEventListener("click", () => sortBy(table, th, k));
      th.append(button);
    });
  }

  // What scrolls can be reached by the keyboard, and shows at its right edge that there is more.
  const more = e => e.classList.toggle("more", e.scrollWidth - e.clientWidth - e.scrollLeft > 1);
  const reachable = () => {
    for (const e of document.querySelectorAll("table.facts, mjx-container[display], .bd-article pre, div.cell_output")) {
      if (e.scrollWidth > e.clientWidth) { e.tabIndex = 0; e.onscroll = () => more(e); }
      more(e);
    }
  };
  addEventListener("resize", reachable);
  addEventListener("load", () => { reachable(); window.MathJax?.startup?.promise?.then(reachable); });

  // A link to a symbol lands on its folded source too when that is what was asked for.
  const open = () => document.getElementById(decodeURIComponent(location.hash.slice(1)))?.closest("details")?.setAttribute("open", "");
  addEventListener("hashchange", open); open();
})();
