"use strict";
// Elements and texts. Every string that reaches the page goes through here: as text, never as markup, with what would
// be invisible or would reorder its surroundings written out.

const HIDDEN = /(?![\n\t])[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu;

function escaped(character) {
  const code = character.codePointAt(0);
  const digits = code.toString(16);
  if (code < 0x100) return `\\x${digits.padStart(2, "0")}`;
  return code < 0x10000 ? `\\u${digits.padStart(4, "0")}` : `\\u{${digits}}`;
}

/** A text for attributes and titles, with escapes in place of control and bidi characters. */
function shown(text) {
  return String(text).replace(HIDDEN, escaped);
}

/** A text as nodes of the page. Escapes stand in elements of their own. */
function visible(text) {
  const whole = String(text);
  const fragment = document.createDocumentFragment();
  let end = 0;
  for (const match of whole.matchAll(HIDDEN)) {
    if (match.index > end) fragment.append(whole.slice(end, match.index));
    const escape = document.createElement("span");
    escape.className = "escape";
    escape.textContent = escaped(match[0]);
    fragment.append(escape);
    end = match.index + match[0].length;
  }
  fragment.append(whole.slice(end));
  return fragment;
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : shown(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : visible(child));
  }
  return element;
}

/** An HTML element; strings among the children are text. */
function h(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** An SVG element. */
function s(name, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

/** Makes these the children of an element. */
function put(element, ...children) {
  element.replaceChildren();
  return fill(element, null, children);
}

const isNumber = (value) => typeof value === "number";
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** Three significant digits, or the integer. */
function digits(value) {
  if (!isNumber(value)) return "–";
  if (Number.isInteger(value)) return Math.abs(value) < 1e6 ? value.toLocaleString("en") : value.toPrecision(3);
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(1);
  return size >= 100 ? value.toFixed(0) : value.toPrecision(size >= 1 ? 3 : 2);
}

const percent = (value) => (isNumber(value) ? `${(100 * value).toFixed(1)}%` : "–");
const points = (value) => (isNumber(value) ? value.toFixed(2).replace("-", "−") : "–");
const nats = (value) => (isNumber(value) && Math.abs(value) < 0.095 ? value.toFixed(3).replace("-", "−") : points(value));
const signed = (value) => (isNumber(value) ? (value === 0 ? "0" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`) : "–");

/** The terms of a reward, or other named numbers, on one line. */
function terms(values) {
  return Object.entries(values ?? {})
    .filter(([, value]) => value !== null)
    .map(([name, value]) => `${name} ${digits(value)}`)
    .join("  ");
}

/** The values of a mapping on one line; nothing if it is empty. */
function line(values) {
  const told = Object.entries(values ?? {}).map(([name, value]) => `${name} ${typeof value === "string" ? value : JSON.stringify(value)}`);
  return told.join(", ");
}

function json(value) {
  return JSON.stringify(value, null, 1);
}
