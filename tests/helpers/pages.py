"""Common parts of the tests of HTML pages: texts that try to inject markup, and a script that measures contrast."""

EVIL = (
    "<img src=x onerror=alert(1)>",
    '</script><script>alert("2")</script>',
    "<!-- <script>",
    "'\"><svg onload=alert(3)>",
)

CONTRAST = """() => {
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => { const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const against = (element, property) => { const ink = light(getComputedStyle(element)[property]);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); };
  const read = "p, h1, h2, li, td, th, small, figcaption";
  const texts = [...document.querySelectorAll(read)].map((e) => against(e, "color"));
  const labels = [...document.querySelectorAll("svg text")].map((e) => against(e, "fill"));
  return { paper, texts: Math.min(...texts), labels: Math.min(...labels), counted: [texts.length, labels.length] };
}"""
