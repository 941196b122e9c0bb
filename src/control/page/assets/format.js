// Numbers and times as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

export function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  let unit = 0;
  let value = bytes;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || value >= 100 || Number.isInteger(value) ? 0 : 1;
  return `${value.toFixed(digits)} ${UNITS[unit]}`;
}

export function share(part, whole) {
  if (!whole) return "–";
  const percent = (part * 100) / whole;
  return `${percent > 0 && percent < 0.1 ? "<0.1" : percent.toFixed(1)} %`;
}

export function span(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86400)} d`;
}

// How long ago an RFC 3339 time was.
export function ago(time, now = Date.now()) {
  const at = Date.parse(time);
  return Number.isNaN(at) ? "–" : `${span((now - at) / 1000)} ago`;
}

export function plain(value) {
  return value === null || value === undefined || value === "" ? "–" : String(value);
}

// Sets a text only when it differs, so that focus, selection and screen readers are left alone.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// An element with a class and a text.
export function make(tag, text = "", className = "") {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (className) element.className = className;
  return element;
}
