// Runs before a page's own scripts, in every frame: virtual time, the page as items of text and controls, and walls.
(settings => {
  "use strict";
  if (window.__treegym) return;
  const above = (() => { try { return window.parent !== window && window.parent.__treegym; } catch { return null; } })();
  const native = {
    setTimeout: window.setTimeout.bind(window), now: performance.now.bind(performance), Date: window.Date,
    fetch: window.fetch?.bind(window),
  };
  // of the document: it is never shown, so that it need not be the same in every run
  const id = [...crypto.getRandomValues(new Uint32Array(2))].join("-");
  const PATIENCE = 5000;  // real milliseconds for what is under way: pictures, fonts, requests
  const FRAME = 16;  // virtual milliseconds between animation frames

  // ---- time

  const clock = above ? above.clock : { now: 0, order: 0, last: 0, due: new Map() };
  const born = clock.now;
  const instant = () => settings.start + Math.floor(clock.now);

  const later = (callback, delay, every, rest) => {
    const wait = Math.max(1, Number(delay) || 0);
    clock.due.set(++clock.last, { id: clock.last, time: clock.now + wait, order: ++clock.order, every: every && wait,
                                  frame: window, callback, rest });
    return clock.last;
  };
  const cancel = number => { clock.due.delete(number); };

  window.setTimeout = (callback, delay, ...rest) => later(callback, delay, false, rest);
  window.setInterval = (callback, delay, ...rest) => later(callback, delay, true, rest);
  window.clearTimeout = window.clearInterval = window.cancelAnimationFrame = window.cancelIdleCallback = cancel;
  window.requestAnimationFrame = callback =>
    later(() => callback(clock.now - born), FRAME - clock.now % FRAME, false, []);
  window.requestIdleCallback = callback =>
    later(() => callback({ didTimeout: false, timeRemaining: () => 50 }), 1, false, []);
  performance.now = () => clock.now - born;
  Object.defineProperty(performance, "timeOrigin", { get: () => settings.start + born });
  Object.defineProperty(Event.prototype, "timeStamp", { get: () => clock.now - born });
  window.Date = new Proxy(native.Date, {
    construct: (target, given, made) => Reflect.construct(target, given.length ? given : [instant()], made),
    apply: () => new native.Date(instant()).toString(),
    get: (target, name) => (name === "now" ? instant : Reflect.get(target, name)),
  });
  native.Date.prototype.constructor = window.Date;

  const still = new CSSStyleSheet();
  still.replaceSync(`*, *::before, *::after { transition-duration: 0s !important; transition-delay: 0s !important;
    animation-duration: 0s !important; animation-delay: 0s !important; scroll-behavior: auto !important;
    caret-color: transparent !important; }`);
  document.adoptedStyleSheets.push(still);

  const run = timer => {
    if (timer.every) { timer.time += timer.every; timer.order = ++clock.order; } else clock.due.delete(timer.id);
    try {
      if (typeof timer.callback === "function") timer.callback.apply(timer.frame, timer.rest);
      else timer.frame.eval(String(timer.callback));
    } catch (error) { timer.frame.reportError?.(error); }
  };
  const earliest = () => {
    let first = null;
    for (const timer of clock.due.values())
      if (!first || timer.time < first.time || (timer.time === first.time && timer.order < first.order)) first = timer;
    return first;
  };
  const channel = new MessageChannel(), waiting = [];
  channel.port1.onmessage = () => waiting.shift()();
  const turn = () => new Promise(done => { waiting.push(done); channel.port2.postMessage(0); });

  const underway = new Set();  // requests, scripts, style sheets and frames that have begun and not ended
  const frames = () => [window, ...[...document.querySelectorAll("iframe, frame")].flatMap(frame => {
    try { return frame.contentWindow.__treegym.frames(); } catch { return []; }
  })];
  const loading = () => underway.size > 0 || document.readyState !== "complete" || document.fonts.status === "loading"
    || [...document.images].some(image => !image.complete && image.loading !== "lazy");
  const quiet = async () => {
    const since = native.now();
    while (frames().some(frame => frame.__treegym?.loading()) && !leaving()) {
      if (native.now() - since > PATIENCE) { for (const frame of frames()) frame.__treegym?.underway.clear(); return; }
      await new Promise(done => native.setTimeout(done, 2));
    }
  };
  // Lets so many virtual milliseconds pass. Whatever is under way comes first, so that it takes no virtual time.
  const advance = async milliseconds => {
    const end = clock.now + milliseconds;
    await turn();
    for (;;) {
      await quiet();
      const timer = earliest();
      if (leaving()) return "leaving";
      if (!timer || timer.time > end) break;
      clock.now = Math.max(clock.now, timer.time);
      run(timer);
      await turn();  // promises and messages that the timer started come before the next timer
    }
    clock.now = end;
    return id;
  };

  if (native.fetch) window.fetch = (...given) => {
    const mark = {};
    underway.add(mark);
    const answer = native.fetch(...given);
    answer.then(reply => reply.clone().arrayBuffer()).catch(() => {}).finally(() => underway.delete(mark));
    return answer;
  };
  const send = XMLHttpRequest.prototype.send;
  XMLHttpRequest.prototype.send = function (...given) {
    underway.add(this);
    this.addEventListener("loadend", () => underway.delete(this));
    return send.apply(this, given);
  };
  const fetched = node => (node.tagName === "SCRIPT" && node.src) || node.tagName === "IFRAME"
    || (node.tagName === "LINK" && node.rel === "stylesheet");
  new MutationObserver(changes => {
    for (const change of changes) for (const node of change.addedNodes)
      if (fetched(node) && document.readyState === "complete") underway.add(node);
  }).observe(document, { childList: true, subtree: true });
  for (const kind of ["load", "error"]) window.addEventListener(kind, event => underway.delete(event.target), true);

  // ---- chance

  let state = settings.seed >>> 0;
  const chance = () => {  // mulberry32
    state = (state + 0x6D2B79F5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
  Math.random = chance;
  const fill = array => {
    const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
    for (let i = 0; i < bytes.length; i++) bytes[i] = Math.floor(chance() * 256);
    return array;
  };
  Crypto.prototype.getRandomValues = fill;
  if (Crypto.prototype.randomUUID) Crypto.prototype.randomUUID = () => {
    const hex = [...fill(new Uint8Array(16))].map(byte => byte.toString(16).padStart(2, "0")).join("");
    return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-4${hex.slice(13, 16)}-a${hex.slice(17, 20)}-${hex.slice(20)}`;
  };

  // ---- walls: what would leave the page is told instead

  const TOLD = 3;  // of dialogs and windows, in a document
  let told = 0;
  const binding = window.__treegymTell;
  delete window.__treegymTell;
  const tell = text => { if (++told <= TOLD) binding?.(String(text).slice(0, 300)); };
  const quote = text => JSON.stringify(String(text ?? "").slice(0, 200));
  window.alert = text => { tell(`a dialog said ${quote(text)}`); };
  window.confirm = text => { tell(`a dialog asked ${quote(text)}; it was cancelled`); return false; };
  window.prompt = text => { tell(`a dialog asked ${quote(text)}; it was cancelled`); return null; };
  window.print = () => {};
  window.open = address => { tell(`a window was closed: ${quote(address)}`); return null; };
  const opened = event => {
    const form = event.type === "submit", from = form ? event.target : event.target.closest?.("a[target], area[target]");
    const target = event.submitter?.getAttribute("formtarget") ?? from?.getAttribute?.("target");
    if (!target || event.defaultPrevented || /^_(self|top|parent)$/i.test(target) || window.frames[target]) return;
    event.preventDefault();
    tell(`a window was closed: ${quote(form ? from.action : from.href)}`);
  };
  window.addEventListener("click", opened);
  window.addEventListener("submit", opened);

  let departure = null;  // the event of a navigation to another document
  const leaving = () => Boolean(departure && !departure.defaultPrevented && !departure.stays);
  const intercept = window.NavigateEvent?.prototype.intercept;
  if (intercept) NavigateEvent.prototype.intercept = function (...given) {
    this.stays = true;
    return intercept.apply(this, given);
  };
  window.navigation?.addEventListener("navigate", event => {
    if (event.destination.sameDocument || event.hashChange) return;
    const { origin, href } = new URL(event.destination.url, document.baseURI);
    if (event.cancelable && (event.downloadRequest !== null || (origin !== location.origin && origin !== "null"))) {
      event.preventDefault();
      tell(`${event.downloadRequest !== null ? "a download was refused" : "this leads outside, which is closed"}: ${quote(href)}`);
      return;
    }
    departure = event;
  });
  window.navigation?.addEventListener("navigateerror", () => { departure = null; });

  // ---- what listens

  const POINTED = new Set("click dblclick mousedown mouseup pointerdown pointerup".split(" "));
  const listeners = new WeakMap();  // element: kinds of events that its own listeners hear
  const listen = EventTarget.prototype.addEventListener;
  EventTarget.prototype.addEventListener = function (kind, listener, ...rest) {
    if (listener && this instanceof Element && POINTED.has(kind))
      listeners.set(this, (listeners.get(this) ?? new Set()).add(kind));
    return listen.call(this, kind, listener, ...rest);
  };
  const heard = element => element !== document.body && element !== document.documentElement
    && (listeners.has(element) || [...POINTED].some(kind => element[`on${kind}`]));

  // ---- reading

  const ROLES = new Set(("button link textbox searchbox combobox listbox checkbox radio switch slider spinbutton tab "
    + "menuitem menuitemcheckbox menuitemradio option treeitem").split(" "));
  const NESTED = new Set("listbox menuitem treeitem".split(" "));  // may hold further controls
  const NATIVE = new Set("A AREA BUTTON INPUT SELECT TEXTAREA SUMMARY".split(" "));
  const SKIPPED = new Set("SCRIPT STYLE TEMPLATE NOSCRIPT HEAD LINK META TITLE DATALIST defs title desc".split(" "));
  const TYPED = new Set("textbox searchbox spinbutton".split(" "));
  const SHAPES = new Set("circle ellipse rect polygon polyline path line".split(" "));
  const COLOURS = Object.entries({
    black: [0, 0, 0], white: [255, 255, 255], gray: [128, 128, 128], red: [255, 0, 0], green: [0, 128, 0],
    lime: [0, 255, 0], blue: [0, 0, 255], yellow: [255, 255, 0], orange: [255, 165, 0], purple: [128, 0, 128],
    magenta: [255, 0, 255], cyan: [0, 255, 255], brown: [139, 69, 19], pink: [255, 192, 203], olive: [128, 128, 0],
  });
  const HUES = [[15, "red"], [45, "orange"], [70, "yellow"], [165, "green"], [195, "cyan"], [260, "blue"], [290, "purple"],
                [345, "pink"], [361, "red"]];  // upper ends in degrees
  const MOST = 100_000;  // characters of a page that are read

  const keys = new WeakMap(), elements = new Map();
  const keyOf = element => {
    if (!keys.has(element)) {
      const key = `${id}.${elements.size + 1}`;
      keys.set(element, key);
      elements.set(key, new WeakRef(element));
    }
    return keys.get(element);
  };
  const flat = text => (text ?? "").replace(/\s+/g, " ").trim();
  const words = element => {
    const source = element.getAttribute("src")?.split(/[?#]/)[0].split("/").pop().replace(/\.\w+$/, "");
    const found = flat(`${element.id} ${element.getAttribute("class") ?? ""}`)
      || (source?.startsWith("data:") ? "" : source) || element.getAttribute("name") || "";
    const parts = found.replace(/([a-z])([A-Z])/g, "$1 $2").replace(/(?!(?<!\w)-\d)[^\p{L}\p{N}]+?/gu, " ").toLowerCase()
      .split(/\s+/);
    return parts.filter((part, place) => part && (/^-?\d/.test(part) || parts.indexOf(part) === place)).slice(0, 10).join(" ");
  };
  const colour = text => {
    const [red, green, blue, alpha = 1] = (text.match(/[\d.]+/g) ?? []).map(Number);
    if (blue === undefined || alpha === 0) return "";
    const near = ([, [r, g, b]]) => Math.abs(r - red) + Math.abs(g - green) + Math.abs(b - blue) < 24;
    const named = COLOURS.find(near);
    if (named) return named[0];
    const high = Math.max(red, green, blue), low = Math.min(red, green, blue), light = (high + low) / 510;
    const shade = light < 0.3 ? "dark " : light > 0.75 ? "light " : "";
    if (high - low < 24) return `${shade}gray`;
    const turn = high === red ? (green - blue) / (high - low) : high === green ? 2 + (blue - red) / (high - low)
      : 4 + (red - green) / (high - low);
    return shade + HUES.find(([upto]) => (turn * 60 + 360) % 360 < upto)[1];
  };
  const size = element => {
    const { width, height } = element.getBoundingClientRect();
    return `${Math.round(width)}x${Math.round(height)}`;
  };
  const SIDES = { 3: "triangle", 4: "quadrilateral", 5: "pentagon", 6: "hexagon" };
  const figure = element => {
    const style = getComputedStyle(element), tag = element.tagName;
    const { width, height } = element.getBoundingClientRect();
    let shape = tag === "text" ? flat(element.textContent) : tag;
    if (tag === "rect") shape = Math.abs(width - height) < 2 ? "square" : "rectangle";
    if (tag === "polygon") shape = SIDES[element.points.numberOfItems] ?? `polygon with ${element.points.numberOfItems} sides`;
    const painted = style.fill !== "none" && tag !== "line" ? style.fill : style.stroke;
    return [shape, colour(painted), size(element)].filter(Boolean).join(" ");
  };

  const shown = (element, style) => {
    if (!element.checkVisibility() || Number(style.opacity) === 0) return false;
    if (style.display === "contents") return true;
    const box = element.getBoundingClientRect();
    if (style.overflow !== "visible" && (box.width <= 1 || box.height <= 1)) return false;
    if (/inset\(50%|rect\(0px,? 0px,? 0px,? 0px\)|rect\(1px,? 1px,? 1px,? 1px\)/.test(style.clipPath + style.clip)) return false;
    if (!box.width || !box.height || (box.right > 0 && box.bottom > 0)) return true;
    let right = box.right + scrollX, bottom = box.bottom + scrollY;  // what was scrolled away is still there
    for (let each = element.parentElement; each && each !== document.scrollingElement; each = each.parentElement)
      [right, bottom] = [right + each.scrollLeft, bottom + each.scrollTop];
    return right > 0 && bottom > 0;
  };
  const visible = element => {
    for (let each = element; each; each = each.parentElement)
      if (!shown(each, getComputedStyle(each))) return false;
    return getComputedStyle(element).visibility === "visible";
  };
  const editable = element => element.isContentEditable && !element.parentElement?.isContentEditable;
  const inside = element => [...element.querySelectorAll("*")];
  const acts = element => NATIVE.has(element.tagName) || heard(element)
    || (element.hasAttribute("tabindex") && element.tabIndex >= 0) || ROLES.has(element.getAttribute("role"));

  // The text of an element outside the controls in it.
  const ownText = element => {
    const text = node => node.nodeType === Node.TEXT_NODE ? node.data
      : node.nodeType !== Node.ELEMENT_NODE || SKIPPED.has(node.tagName) || node.tagName === "LABEL" || acts(node) ? " "
      : ` ${[...node.childNodes].map(text).join("")} `;
    return flat([...element.childNodes].map(text).join(""));
  };
  // Whether the pointer becomes a hand over it, and not because it does so over what it is in.
  const isPointed = (element, style) => style.cursor === "pointer" && element.parentElement
    && getComputedStyle(element.parentElement).cursor !== "pointer";
  // Something that can be clicked and has further controls in it, such as a line of a list.
  const isCard = element => {
    const text = heard(element) && ownText(element);
    return text && text.length <= 120 && inside(element).filter(acts).length <= 8;
  };
  // The role of a control, or "" for what is none.
  const roleOf = (element, style) => {
    const tag = element.tagName;
    if (tag === "INPUT" && element.type === "hidden") return "";
    if (editable(element)) return "textbox";
    if (NATIVE.has(tag) || element.hasAttribute("role")) {
      const role = element.computedRole;
      if (ROLES.has(role)) return role;
      if (["INPUT", "TEXTAREA"].includes(tag))
        return ["color", "date", "datetime-local", "month", "time", "week"].includes(element.type) ? "textbox" : "button";
      if (tag === "SUMMARY") return "button";
    }
    const pointed = isPointed(element, style);
    const focusable = element.hasAttribute("tabindex") && element.tabIndex >= 0;
    if (!heard(element) && !pointed && !focusable) return "";
    if (tag === "svg" || tag === "IFRAME" || tag === "LABEL") return "";
    if (inside(element).some(acts)) return isCard(element) ? "clickable" : "";
    if (!pointed && inside(element).some(part => isPointed(part, getComputedStyle(part)))) return "";
    if ((focusable || pointed) && !heard(element) && flat(element.innerText).length > 200) return "";
    return "clickable";
  };
  const nameOf = (element, role) => {
    const spoken = flat(element.computedName);
    if (spoken) return spoken;
    if (!TYPED.has(role) && role !== "combobox" && role !== "listbox") {
      const said = flat(element.innerText ?? element.textContent).slice(0, 300);
      if (said) return said;
    }
    return flat(element.title || element.placeholder || element.alt || "");
  };
  const control = (element, role, from = element) => {
    const is = name => from.getAttribute(`aria-${name}`) === "true";
    const item = { key: keyOf(element), role, name: nameOf(from, role), states: [] };
    if (!item.name && from !== element) item.name = flat(element.innerText);
    if (element.tagName === "text") item.name = figure(element);
    if (!item.name) {
      const said = words(element) || inside(element).map(words).find(Boolean) || "";
      item.name = SHAPES.has(element.tagName) ? flat(`${figure(element)} ${said}`)
        : said || (TYPED.has(role) ? element.type ?? "" : "");
      const painted = colour(getComputedStyle(element).backgroundColor);
      if (role === "clickable" && painted) item.name = flat(`${item.name} ${painted} ${size(element)}`);
      item.vague = Boolean(item.name);
    }
    if (from.tagName === "SELECT") {
      item.options = [...from.options].map(option => option.label);
      item.chosen = [...from.selectedOptions].map(option => option.label);
    } else if (role === "slider" || TYPED.has(role) || role === "combobox") {
      const said = from.value ?? from.getAttribute("aria-valuetext") ?? from.getAttribute("aria-valuenow");
      item.value = from.type === "password" ? "•".repeat(from.value.length) : String(said ?? from.innerText ?? "");
    }
    if (from.checked || is("checked")) item.states.push("checked");
    if (from.matches(":disabled") || is("disabled")) item.states.push("disabled");
    if (is("expanded") || (from.tagName === "SUMMARY" && from.parentElement?.open)) item.states.push("expanded");
    if (is("selected")) item.states.push("selected");
    return item;
  };

  const read = () => {
    const items = [];
    let line = "", room = MOST;
    const flush = () => {
      const text = line.replace(/[\s\u0000]+$/, "").replace(/^[\s\u0000]+/, "");
      if (text) items.push(flat(text.replace(/\s*\u0000\s*/g, " | ")));
      line = "";
    };
    const say = text => { room -= text.length; line += text; };
    const put = item => { flush(); items.push(item); room -= 20 + item.name.length; };
    const children = element => {
      if (element.tagName === "DETAILS" && !element.open)
        return [...element.children].filter(child => child.tagName === "SUMMARY").slice(0, 1);
      if (element.tagName === "SLOT" && element.assignedNodes().length) return element.assignedNodes();
      return (element.shadowRoot ?? element).childNodes;
    };
    const walk = (element, style, muted, cell) => {
      const keeps = /^(pre|break-spaces)/.test(style.whiteSpace) || style.whiteSpaceCollapse?.startsWith("preserve");
      for (const child of children(element)) {
        if (room < 0) return;
        if (child.nodeType === Node.ELEMENT_NODE) visit(child, muted, cell);
        else if (child.nodeType === Node.TEXT_NODE && !muted && style.visibility === "visible") {
          if (!keeps) say(child.data);
          else child.data.split("\n").forEach((part, place) => { if (place) flush(); say(part); });
        }
      }
    };
    const drawing = (element, clicked) => {
      for (const shape of inside(element)) {
        const style = getComputedStyle(shape);
        if (!shape.checkVisibility() || style.visibility !== "visible" || shape.closest("defs")) continue;
        const drawn = SHAPES.has(shape.tagName);
        if ((clicked || heard(shape)) && (drawn || shape.tagName === "text")) put(control(shape, "clickable"));
        else if (drawn) { flush(); say(`(${figure(shape)})`); flush(); }
        else if (shape.tagName === "text" && flat(shape.textContent)) { flush(); say(shape.textContent); flush(); }
      }
    };
    const visit = (element, muted, cell) => {
      const tag = element.tagName;
      if (SKIPPED.has(tag)) return;
      if (tag === "BR" || tag === "HR") { if (cell) say(" "); else flush(); return; }
      const style = getComputedStyle(element);
      if (!shown(element, style)) return;
      const isCell = style.display === "table-cell";
      const block = !isCell && !/^(inline|contents|ruby)/.test(style.display);
      if (block) { if (cell) say(" "); else flush(); }
      if (isCell) say("\u0000");
      const within = isCell ? element.textContent.length < 200 : cell && block ? cell : cell;
      content(element, style, muted, within);
      if (block) { if (cell) say(" "); else flush(); }
      else if (style.display.startsWith("inline-")) say(" ");
    };
    const content = (element, style, muted, cell) => {
      const tag = element.tagName, on = style.visibility === "visible";
      const role = on ? roleOf(element, style) : "";
      if (role) {
        const card = role === "clickable" && inside(element).some(acts), item = control(element, role);
        put(card ? { ...item, name: ownText(element), vague: false } : item);
        if (card) walk(element, style, true, cell);
        if (NESTED.has(role) && tag !== "SELECT")
          for (const part of element.children)
            if (role === "listbox" || /^(UL|OL)$/.test(part.tagName) || /^(group|menu|tree)$/.test(part.getAttribute("role")))
              visit(part, muted, cell);
        return;
      }
      if (tag === "IMG") {
        const alt = element.getAttribute("alt"), vague = alt === null ? words(element) : "";
        if (on && (alt || vague)) say(` (image ${alt ? flat(alt) : `~${vague}`}) `);
        return;
      }
      if (tag === "CANVAS") { if (on) { flush(); say(`(canvas ${size(element)})`); flush(); } return; }
      if (tag === "svg") {
        const name = flat(element.computedName);
        if (name) say(` (image ${name}) `); else drawing(element, heard(element));
        return;
      }
      if (tag === "IFRAME" || tag === "FRAME") {
        try { content(element.contentDocument.body, element.contentWindow.getComputedStyle(element.contentDocument.body), muted, false); }
        catch { /* of another origin, which is closed */ }
        return;
      }
      const labelled = tag === "LABEL" ? element.control : null;
      if (labelled && !visible(labelled) && ["checkbox", "radio"].includes(labelled.type)) {
        put(control(element, labelled.type, labelled));
        return;
      }
      const named = labelled && visible(labelled) && flat(labelled.computedName).includes(flat(label(element, labelled)));
      walk(element, style, muted || named, cell);
    };
    const label = (element, labelled) => [...element.childNodes].filter(node => !node.contains?.(labelled))
      .map(node => node.textContent).join(" ");
    if (document.body) content(document.body, getComputedStyle(document.body), false, false);
    flush();
    if (room < 0) items.push("(the rest of this page is left out)");
    return { address: location.href, document: id, items };
  };

  // ---- acting

  const find = key => {
    for (const frame of frames()) {
      const element = frame.__treegym?.elements.get(key)?.deref();
      if (element?.isConnected) return element;
    }
    return null;
  };
  const origin = frame => {  // of a frame's viewport in the top one's
    if (frame === window) return { x: 0, y: 0 };
    const box = frame.frameElement.getBoundingClientRect(), outer = origin(frame.parent);
    return { x: outer.x + box.x + frame.frameElement.clientLeft, y: outer.y + box.y + frame.frameElement.clientTop };
  };
  const hit = (element, x, y) => {
    let found = element.ownerDocument.elementFromPoint(x, y);
    while (found?.shadowRoot) {
      const deeper = found.shadowRoot.elementFromPoint(x, y);
      if (!deeper || deeper === found) break;
      found = deeper;
    }
    return found;
  };
  const reaches = (element, found) => {
    for (let each = found; each; each = each.parentNode ?? each.host) if (each === element) return true;
    return Boolean(found && (element.labels && [...element.labels].some(one => one.contains(found))));
  };
  const nearest = found => {
    let each = found;
    while (each && !keys.has(each)) each = each.parentNode ?? each.host;
    return each;
  };
  // Where the pointer meets an element, in the top frame's viewport, or what keeps it from there.
  const aim = key => {
    const element = find(key);
    if (!element) return { fault: "has gone: look at the page again" };
    if (element.tagName === "SELECT") { element.focus(); return { focused: true }; }
    element.scrollIntoView({ block: "center", inline: "center", behavior: "instant" });
    let over = null, inner = null;
    const base = origin(element.ownerDocument.defaultView);
    for (const box of element.getClientRects())
      for (const [right, down] of [[.5, .5], [.25, .5], [.75, .5], [.5, .25], [.5, .75], [.1, .1], [.9, .9]]) {
        const x = box.x + box.width * right, y = box.y + box.height * down, found = hit(element, x, y);
        if (!reaches(element, found)) { over ??= found; continue; }
        const point = { x: base.x + x, y: base.y + y };
        if (nearest(found) === element) return point;
        inner ??= point;  // on another control within the element
      }
    if (inner) return inner;
    const what = over && flat(over.innerText).slice(0, 60);
    return { fault: over ? `is covered${what ? ` by ${quote(what)}` : ""}` : "is not to be seen now" };
  };
  const SET = new Set("color date datetime-local month range time week".split(" "));
  const tellChange = element => {
    for (const kind of ["input", "change"]) element.dispatchEvent(new Event(kind, { bubbles: true }));
  };
  // Focuses a field with all of its text selected; says whether the text has been set already.
  const enter = (key, text) => {
    const element = find(key);
    if (!element) return { fault: "has gone: look at the page again" };
    if (element.readOnly) return { fault: "can only be read" };
    element.scrollIntoView({ block: "center", behavior: "instant" });
    element.focus();
    if (SET.has(element.type)) {
      const kept = element.value;
      Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set.call(element, text);
      if (text && element.value === "" ) { element.value = kept; return { fault: `takes no ${quote(text)}: it is a field for a ${element.type}` }; }
      tellChange(element);
      return { set: true };
    }
    if (element.select) element.select();
    else element.ownerDocument.getSelection().selectAllChildren(element);
    return { lines: element.tagName === "TEXTAREA" || element.isContentEditable };
  };
  const choose = (key, wanted) => {
    const element = find(key);
    if (!element) return { fault: "has gone: look at the page again" };
    const option = [...(element.options ?? [])].find(each => each.label === wanted);
    if (!option || option.disabled) return { fault: option ? "cannot choose this option now" : "has changed: look at the page again" };
    element.focus();
    option.selected = element.multiple ? !option.selected : true;
    tellChange(element);
    return {};
  };
  const scroll = key => {
    let element = find(key);
    if (!element) return { fault: "has gone: look at the page again" };
    const room = each => each.scrollHeight > each.clientHeight + 1 && /auto|scroll/.test(getComputedStyle(each).overflowY + (each.tagName === "TEXTAREA" ? "auto" : ""));
    while (element && !room(element)) element = element.parentElement;
    element ??= document.scrollingElement;
    const before = element.scrollTop;
    element.scrollBy({ top: element.clientHeight * 0.9, behavior: "instant" });
    return { moved: element.scrollTop !== before };
  };

  Object.defineProperty(window, "__treegym", { value: Object.freeze({
    id, clock, elements, underway, frames, loading, advance, read, aim, enter, choose, scroll, leaving,
    stay: () => { departure = null; },
  }) });
})
