"use strict";
(() => {
  // Everything that a slide brings along is set as text, never as markup.
  const data = JSON.parse(document.getElementById("data").textContent);
  const ROWS_PER_PAGE = 100, SHEET_CELLS = 24, SHEET_STEP = 120, SHORT_ID = 24, DASH = "–";
  const $ = (id) => document.getElementById(id);
  const count = new Intl.NumberFormat("en-US");
  const all = Array.from({ length: data.rows }, (_, i) => i);

  function element(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in made && name !== "style") made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  // --- values of a slide ---------------------------------------------------------------------
  const word = (field) => (i) => data.coded[field].values[data.coded[field].codes[i]];
  const plain = (field) => (i) => data.plain[field][i];
  const slideId = plain("slide");
  const classNamed = Object.fromEntries(data.classes.map((one) => [one.name, one]));
  const mm2 = (name) => (i) => classNamed[name].mm2[i];
  const foundMm2 = (i) => data.classes.reduce((sum, one) => sum + (one.mm2[i] ?? NaN), 0);
  const shareOf = (names) => (i) => {
    const total = foundMm2(i);
    return total > 0 ? names.reduce((sum, name) => sum + classNamed[name].mm2[i], 0) / total : null;
  };
  const share = (name) => shareOf([name]);
  const artifact = shareOf(data.classes.filter((one) => one.refuses).map((one) => one.name).sort());
  const selected = (i) => {
    const chosen = data.selections.find((one) => one.name === state.selection);
    return chosen && (chosen.tiles[i] || plain("candidates")(i)) ? chosen.tiles[i] : null;
  };
  const area = (i) => plain("width")(i) === null ? null : plain("width")(i) * plain("height")(i);

  const short = (value, digits = 3) => {
    if (value === null || Number.isNaN(value)) return DASH;
    if (Math.abs(value) >= 1000) return count.format(Math.round(value));
    return String(Number(value.toPrecision(digits)));
  };
  const whole = (value) => value === null ? DASH : count.format(value);
  const percent = (value) => {
    if (value === null || Number.isNaN(value)) return DASH;
    if (value === 0) return "0";
    return value < 0.001 ? "<0.1" : (100 * value).toFixed(1);
  };
  const size = (i) => area(i) === null ? DASH
    : `${count.format(plain("width")(i))} × ${count.format(plain("height")(i))}`;

  // --- columns: what can be sorted, and cells of one or two of them ---------------------------
  const SHORT_CLASS = { "out of focus": "blur", "other artifact": "other" };
  const artifactClasses = data.classes.filter((one) => one.name !== "tissue");
  const sorts = {
    slide: ["Slide", slideId], patient: ["Patient", word("patient")],
    status: ["Status", word("status")], reason: ["Reason", word("reason")],
    site: ["Site", word("site")], project: ["Project", word("project")],
    mpp: ["mpp", plain("mpp")], mpp_source: ["from", word("mpp_source")],
    reader: ["Reader", word("reader")], size: ["Size", area],
    tissue: ["Tissue mm²", mm2("tissue")],
    artifact: ["Artifacts %", artifact],
    candidates: ["Candidates", plain("candidates")],
    selected: ["Selected", selected],
  };
  for (const one of artifactClasses) {
    sorts[one.name] = [`${SHORT_CLASS[one.name] ?? one.name} %`, share(one.name)];
  }
  const cells = [
    { keys: [], label: "", width: "7.5rem", kind: "thumb", fill: (i, cell) => {
      const link = thumb(i);
      link.tabIndex = -1; // the slide's name beside it leads to the same place
      cell.append(link);
    } },
    { keys: ["slide", "patient"], width: "17%", fill: (i, cell) => cell.append(
      element("a", { href: `#slide=${encodeURIComponent(slideId(i))}`, className: "id" }, slideId(i)),
      element("small", {}, word("patient")(i))) },
    { keys: ["status", "reason"], width: "20.5%", fill: (i, cell) => cell.append(
      badge(i), element("small", { className: "reason", title: word("reason")(i) },
        word("reason")(i))) },
    { keys: ["project", "site"], width: "9%", fill: (i, cell) => cell.append(
      word("project")(i) || DASH, element("small", {}, word("site")(i))) },
    { keys: ["mpp", "mpp_source"], width: "6.5%", fill: (i, cell) => cell.append(
      short(plain("mpp")(i), 4), element("small", {}, word("mpp_source")(i))) },
    { keys: ["reader", "size"], width: "9%", fill: (i, cell) => cell.append(
      word("reader")(i) || DASH, element("small", {}, size(i))) },
    number("tissue", "6.5%", (i) => short(mm2("tissue")(i))),
    ...artifactClasses.map((one) => number(one.name, "4.6%", (i) => percent(share(one.name)(i)))),
    number("candidates", "8%", (i) => whole(plain("candidates")(i))),
    number("selected", "6%", (i) => whole(selected(i))),
  ];
  function number(key, width, text) {
    return { keys: [key], width, kind: "number", fill: (i, cell) => {
      const shown = text(i);
      cell.append(shown);
      if (shown === "0" || shown === DASH) cell.classList.add("nil");
    } };
  }

  function badge(i) {
    const stage = word("stage")(i);
    return element("span", { className: `status ${word("status")(i)}` },
      word("status")(i) + (stage ? ` · ${stage}` : ""));
  }

  const shortId = (i) => slideId(i).length <= SHORT_ID ? slideId(i) : `${slideId(i).slice(0, SHORT_ID - 1)}…`;

  function thumb(i, text = "") {
    const id = encodeURIComponent(slideId(i));
    const picture = data.picture[i]
      ? element("img", { src: `thumbs/${id}.jpg`, loading: "lazy", decoding: "async", alt: "" })
      : element("span", { className: "absent" }, "no picture");
    return element("a", { href: `#slide=${id}`, className: "shot",
      "aria-label": `Details of ${slideId(i)}` }, picture,
      ...(text ? [element("span", { className: "under" }, text)] : []));
  }

  // --- the state lives in the address, so that a view can be shared ----------------------------
  const DEFAULTS = { q: "", status: "", site: null, project: null, kind: "", range: "",
    selection: largest(), sort: "slide", page: 1, slide: "" };
  const FILTERS = ["status", "site", "project", "kind"];
  let state = { ...DEFAULTS };
  let order = all, listed = all, wroteHash = "";

  function largest() {
    const sums = data.selections.map((one) => one.tiles.reduce((a, b) => a + b, 0));
    return data.selections.length ? data.selections[sums.indexOf(Math.max(...sums))].name : "";
  }

  function readHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    state = { ...DEFAULTS };
    for (const key of Object.keys(DEFAULTS)) if (given.has(key)) state[key] = given.get(key);
    state.page = Math.max(1, Number.parseInt(state.page, 10) || 1);
    if (!(state.sort.replace(/^-/, "") in sorts)) state.sort = DEFAULTS.sort;
    if (!data.selections.some((one) => one.name === state.selection)) {
      state.selection = DEFAULTS.selection;
    }
  }

  function writeHash() {
    const said = new URLSearchParams();
    for (const key of Object.keys(DEFAULTS)) {
      if (state[key] !== DEFAULTS[key]) said.set(key, state[key]);
    }
    wroteHash = said.size ? `#${said}` : "";
    if (location.hash === wroteHash) return;
    try {
      history.replaceState(null, "", location.pathname + location.search + wroteHash);
    } catch {
      // Browsers that refuse this for files; an empty hash would scroll to the top.
      location.replace(wroteHash || "#-");
    }
  }

  // --- which rows, in which order ---------------------------------------------------------------
  const haystack = all.map((i) => [slideId(i), ...["patient", "site", "project", "reason", "reader"]
    .map((field) => word(field)(i))].join("\n").toLowerCase());

  function range() {
    const [key, low, high] = state.range.split(":");
    return key in sorts ? { key, low, high } : null;
  }

  function matching() {
    const tests = FILTERS.filter((name) => state[name] !== DEFAULTS[name])
      .map((name) => (i) => word(name)(i) === state[name]);
    if (range()) {
      const { key, low, high } = range();
      const from = Number(low), to = high ? Number(high) : Infinity;
      // The same tolerance as the histogram's, whose bars lead here.
      const slack = 1e-9 * (Number.isFinite(to) ? to - from : from);
      tests.push((i) => {
        const value = sorts[key][1](i);
        return value !== null && value >= from - slack && value < to - slack;
      });
    }
    for (const text of state.q.toLowerCase().split(/\s+/).filter(Boolean)) {
      tests.push((i) => haystack[i].includes(text));
    }
    return all.filter((i) => tests.every((test) => test(i)));
  }

  function sorted(rows) {
    const down = state.sort.startsWith("-");
    const read = sorts[state.sort.replace(/^-/, "")][1];
    const missing = (value) => value === null || value === "" || Number.isNaN(value);
    const keyed = rows.map((i) => [read(i), i]);
    keyed.sort(([a, i], [b, j]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b) || i - j;
      if (a === b) return i - j;
      return (a < b ? -1 : 1) * (down ? -1 : 1);
    });
    return keyed.map(([, i]) => i);
  }

  // --- drawing ----------------------------------------------------------------------------------
  function drawTable() {
    listed = sorted(matching());
    const pages = Math.max(1, Math.ceil(listed.length / ROWS_PER_PAGE));
    state.page = Math.min(state.page, pages);
    const first = (state.page - 1) * ROWS_PER_PAGE;
    $("rows").replaceChildren(...listed.slice(first, first + ROWS_PER_PAGE).map(drawRow));
    const limits = range();
    const words = limits ? `${sorts[limits.key][0].replace(" %", "")} from ${limits.low}`
      + (limits.high ? ` to below ${limits.high}` : "") : "";
    const shown = listed.length > ROWS_PER_PAGE
      ? `; rows ${count.format(first + 1)} to ${count.format(Math.min(first + ROWS_PER_PAGE, listed.length))}` : "";
    $("shown").textContent =
      `${count.format(listed.length)} of ${count.format(data.rows)} slides${state.range ? `, ${words}` : ""}${shown}`;
    document.querySelectorAll(".pager").forEach((place) => drawPager(place, pages));
    drawHeads();
    syncFilters();
  }

  function drawRow(i) {
    return element("tr", { className: `row ${word("status")(i)}` }, ...cells.map((one) => {
      const cell = element("td", { className: one.kind ?? "" });
      if (one.keys.length) cell.dataset.label = one.keys.map((key) => sorts[key][0]).join(", ");
      one.fill(i, cell);
      return cell;
    }));
  }

  function drawHeads() {
    const active = state.sort.replace(/^-/, ""), down = state.sort.startsWith("-");
    const focused = document.activeElement?.dataset?.sort;
    $("heads").replaceChildren(...cells.map((one) => {
      const head = element("th", { scope: "col", className: one.kind ?? "" });
      if (one.keys.includes(active)) {
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
      }
      if (!one.keys.length) head.append(element("span", { className: "hidden" }, "Picture"));
      one.keys.forEach((key, place) => {
        const mark = key === active ? (down ? " ▼" : " ▲") : "";
        const label = key === "selected" && state.selection ? `In ${state.selection}` : sorts[key][0];
        head.append(element("button", { type: "button", "data-sort": key,
          className: place ? "second" : "", title: `Sort by ${sorts[key][0]}` }, label + mark));
      });
      return head;
    }));
    if (focused) document.querySelector(`#heads [data-sort="${CSS.escape(focused)}"]`)?.focus();
  }

  function drawPager(place, pages) {
    const focused = place.contains(document.activeElement) ? document.activeElement.dataset.go : null;
    const go = (label, page, name) => element("button", { type: "button", "data-go": name,
      "data-page": page, disabled: page < 1 || page > pages || page === state.page,
      "aria-label": `${name} page` }, label);
    place.replaceChildren(...(pages < 2 ? [] : [
      go("«", 1, "First"), go("‹", state.page - 1, "Previous"),
      element("span", {}, `page ${count.format(state.page)} of ${count.format(pages)}`),
      go("›", state.page + 1, "Next"), go("»", pages, "Last")]));
    if (focused) place.querySelector(`[data-go="${focused}"]`)?.focus();
  }

  // --- filters ----------------------------------------------------------------------------------
  const form = $("filters");

  function fillSelect(name) {
    const tally = new Map();
    for (const i of all) tally.set(word(name)(i), (tally.get(word(name)(i)) ?? 0) + 1);
    // Slides that were taken have no reason: nothing to choose.
    const options = [...tally].filter(([value]) => value !== "" || name !== "kind")
      .sort(([a], [b]) => (a < b ? -1 : 1));
    form.elements[name].replaceChildren(element("option", { value: "*" }, "any"),
      ...options.map(([value, rows]) => {
        const shown = value.length > 90 ? `${value.slice(0, 89)}…` : value;
        return element("option", { value: `=${value}` },
          `${shown || "(none)"} (${count.format(rows)})`);
      }));
  }

  function prepareFilters() {
    FILTERS.forEach(fillSelect);
    form.elements.selection.replaceChildren(
      ...data.selections.map((one) => element("option", { value: one.name }, one.name)));
    $("selection-label").hidden = data.selections.length < 2;
    form.elements.sort.replaceChildren(...Object.entries(sorts).flatMap(([key, [label]]) => [
      element("option", { value: key }, `${label} ▲`),
      element("option", { value: `-${key}` }, `${label} ▼`)]));
    $("widths").replaceChildren(...cells.map((one) => element("col", { style: `width:${one.width}` })));
  }

  function syncFilters() {
    if (form.elements.q !== document.activeElement) form.elements.q.value = state.q;
    for (const name of FILTERS) {
      form.elements[name].value = state[name] === DEFAULTS[name] ? "*" : `=${state[name]}`;
    }
    form.elements.selection.value = state.selection;
    form.elements.sort.value = state.sort;
  }

  function change(values) {
    state = { ...state, page: 1, ...values };
    drawTable();
    writeHash();
  }

  // --- the contact sheet ------------------------------------------------------------------------
  // Mulberry32, seeded: the same sample for everyone who opens the page.
  function sample(rows, wanted) {
    const left = [...rows], taken = [];
    let seed = 20240229;
    while (left.length && taken.length < wanted) {
      seed = (seed + 0x6d2b79f5) | 0;
      let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      taken.push(left.splice(((t ^ (t >>> 14)) >>> 0) % left.length, 1)[0]);
    }
    return taken.sort((a, b) => a - b);
  }

  const sheets = [];
  function drawSheets() {
    const worst = all.filter((i) => artifact(i) > 0)
      .sort((a, b) => artifact(b) - artifact(a) || a - b).slice(0, SHEET_CELLS);
    const refused = all.filter((i) => ["rejected", "failed"].includes(word("status")(i)));
    const pictured = all.filter((i) => data.picture[i]);
    const parts = [
      ["Most artifacts", worst, (i) => `${percent(artifact(i))}% artifacts`],
      ["Random sample", sample(pictured, SHEET_CELLS), () => ""],
      ["Rejected and failed", refused, (i) => word("reason")(i)],
    ];
    for (const [title, rows, words] of parts) {
      if (!rows.length) continue;
      const box = element("div", { className: "sheet" });
      const place = sheets.push(rows) - 1;
      const more = element("button", { type: "button", className: "more" });
      const extend = () => {
        const from = box.childElementCount;
        box.append(...rows.slice(from, from + SHEET_STEP).map((i) => {
          const cell = thumb(i, shortId(i));
          cell.title = slideId(i);
          cell.dataset.sheet = place;
          if (words(i)) cell.append(element("small", {}, words(i)));
          return cell;
        }));
        const left = rows.length - box.childElementCount;
        more.hidden = left === 0;
        more.textContent = `${count.format(Math.min(left, SHEET_STEP))} more of ${count.format(left)}`;
      };
      more.addEventListener("click", extend);
      extend();
      $("sheets").append(element("h3", {}, `${title} `,
        element("small", {}, count.format(rows.length))), box, more);
    }
  }

  // --- the viewer ---------------------------------------------------------------------------------
  const viewer = $("viewer");
  let walk = all;

  function facts(i) {
    const number = (text) => element("td", { className: "number" }, text);
    const miniTable = (title, rows, cellsOf) => rows.length ? [
      element("h3", {}, title), element("table", { className: "mini" }, element("tbody", {},
        ...rows.map((one) => element("tr", {}, element("th", { scope: "row" },
          ...(one.colour ? [element("span", { className: "swatch", style: `background:${one.colour}` })] : []),
          one.name), ...cellsOf(one)))))] : [];
    const reason = word("reason")(i), mpp = plain("mpp")(i), bytes = plain("bytes")(i);
    const glass = plain("glass")(i);
    const lines = [
      ["Patient", word("patient")(i)], ["Project", word("project")(i)], ["Site", word("site")(i)],
      ["Preparation", word("preparation")(i)],
      ["Resolution", mpp === null ? ""
        : `${short(mpp, 5)} mpp, from ${word("mpp_source")(i) || "an unknown source"}`],
      ["Level 0", area(i) === null ? "" : `${size(i)} px`],
      ["Reader", word("reader")(i)], ["Vendor", word("vendor")(i)], ["Codec", word("codec")(i)],
      ["File", bytes === null ? "" : `${short(bytes / 1e6, 4)} MB`],
      ["Tiles are read from", word("plan")(i)],
      ["Glass, RGB", glass === null ? "" : glass.map((v) => Math.round(v)).join(", ")],
      ["Remark", word("note")(i)],
    ].filter(([, value]) => value !== "" && value !== DASH);
    return [
      badge(i), ...(reason ? [element("p", { className: "reason-full" }, reason)] : []),
      ...miniTable("Grid tiles", data.verdicts.filter((one) => one.tiles[i]),
        (one) => [number(whole(one.tiles[i]))]),
      ...miniTable("Found, mm²", data.classes.filter((one) => one.mm2[i]),
        (one) => [number(short(one.mm2[i], 4)), number(`${percent(share(one.name)(i))}%`)]),
      ...miniTable("Selected tiles", plain("candidates")(i) === null ? [] : data.selections,
        (one) => [number(whole(one.tiles[i]))]),
      element("h3", {}, "Slide"), element("dl", {}, ...lines.flatMap(([name, value]) => [
        element("dt", {}, name), element("dd", {}, value)])),
    ];
  }

  function drawViewer(i) {
    const id = slideId(i);
    $("viewer-title").textContent = id;
    const place = walk.indexOf(i);
    $("viewer-place").textContent =
      place < 0 ? "" : `${count.format(place + 1)} of ${count.format(walk.length)}`;
    const at = `${data.overlays}${encodeURIComponent(id)}.jpg`;
    $("viewer-picture").className = "viewer-picture";
    $("viewer-picture").replaceChildren(data.picture[i]
      ? element("img", { src: at, alt: `Tissue overlay of ${id} with the grid`,
        title: "Click for its full size" })
      : element("p", { className: "absent" }, "no picture"));
    $("viewer-facts").replaceChildren(...facts(i),
      ...(data.picture[i] ? [element("p", {}, element("a", { href: at, target: "_blank",
        rel: "noopener" }, "Open the picture by itself"))] : []));
    $("viewer-facts").scrollTop = 0;
    $("previous").disabled = place <= 0;
    $("next").disabled = place < 0 || place + 1 >= walk.length;
    const following = walk[place + 1];
    if (place >= 0 && following !== undefined && data.picture[following]) {
      new Image().src = `${data.overlays}${encodeURIComponent(slideId(following))}.jpg`;
    }
  }

  function showSlide() {
    const i = state.slide ? data.plain.slide.indexOf(state.slide) : -1;
    if (i < 0) {
      state.slide = "";
      if (viewer.open) viewer.close();
      return;
    }
    if (!walk.includes(i)) walk = listed.includes(i) ? listed : all;
    drawViewer(i);
    if (!viewer.open) viewer.showModal();
  }

  function open(id, rows) {
    walk = rows;
    state.slide = id;
    showSlide();
    writeHash();
  }

  function step(by) {
    const place = walk.indexOf(data.plain.slide.indexOf(state.slide));
    const next = walk[place + by];
    if (place >= 0 && next !== undefined) open(slideId(next), walk);
  }

  // --- what the person does -------------------------------------------------------------------------
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a"), target = link?.getAttribute("href");
    if (!target?.startsWith("#") || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    if (link.dataset.scroll !== undefined) {
      document.querySelector(target).scrollIntoView();
      document.querySelector(target).focus({ preventScroll: true });
      return;
    }
    const wanted = new URLSearchParams(target.slice(1));
    if (wanted.has("slide")) {
      open(wanted.get("slide"), link.closest("#rows") ? listed : sheets[link.dataset.sheet] ?? all);
    } else {
      change({ ...DEFAULTS, selection: state.selection, ...Object.fromEntries(wanted) });
      $("slides").scrollIntoView();
    }
  });
  $("heads").addEventListener("click", (event) => {
    const key = event.target.closest("button")?.dataset.sort;
    if (!key) return;
    const numeric = typeof sorts[key][1](listed.find((i) => sorts[key][1](i) !== null) ?? 0) === "number";
    const first = numeric ? `-${key}` : key, second = numeric ? key : `-${key}`;
    change({ sort: state.sort === first ? second : first });
  });
  document.querySelectorAll(".pager").forEach((place) => place.addEventListener("click", (event) => {
    const page = event.target.closest("button")?.dataset.page;
    if (!page) return;
    change({ page: Number(page) });
    $("slides").scrollIntoView();
  }));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    form.elements.q.value = "";
    change({ ...DEFAULTS });
  });
  form.elements.q.addEventListener("input", () => change({ q: form.elements.q.value.trim() }));
  form.addEventListener("change", (event) => {
    const { name, value } = event.target;
    if (name === "selection" || name === "sort") change({ [name]: value });
    else if (name !== "q") change({ [name]: value === "*" ? DEFAULTS[name] : value.slice(1) });
  });
  viewer.addEventListener("close", () => { state.slide = ""; writeHash(); });
  viewer.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowRight") { event.preventDefault(); step(1); }
    if (event.key === "ArrowLeft") { event.preventDefault(); step(-1); }
  });
  viewer.addEventListener("click", (event) => {
    if (event.target === viewer) viewer.close();
    if (event.target.tagName === "IMG") $("viewer-picture").classList.toggle("full");
  });
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("close").addEventListener("click", () => viewer.close());
  window.addEventListener("hashchange", () => {
    if (location.hash === wroteHash) return;
    readHash();
    drawTable();
    showSlide();
  });

  const name = decodeURIComponent(location.pathname).match(/([^/]+)\/report\/index\.html$/)?.[1];
  if (name) {
    $("dataset-name").textContent = ` of ${name}`;
    document.title = `${name}: slides, quality report`;
  }
  prepareFilters();
  const section = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
  readHash();
  drawTable();
  drawSheets();
  showSlide();
  if (section) section.scrollIntoView();
  else if (location.hash.length > 1 && !state.slide) $("slides").scrollIntoView();
})();
