// What a page asks of its server. Work is a request whose answer comes line by line; leaving the page, or Cancel, ends
// the request, and with it the work.

/** The JSON that the server answers; throws what it says is wrong. */
async function ask(path, body, method = "PUT") {
  const answer = await send(path, body, method);
  return answer.json();
}

async function send(path, body, method, signal) {
  const options = { method, headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is it still running?");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Error(said.error || `The server answers ${answer.status}.`);
}

/** Lines of JSON as they come. */
async function* linesOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (left + value).split("\n");
    left = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

/** Work with a bar, words and a Cancel button; one piece at a time. */
function makeJob() {
  const [box, bar, said, cancel, failed] = ["job", "job-bar", "job-said", "job-cancel", "failed"].map(at);
  let stop = null;
  cancel.onclick = () => stop && stop.abort();
  const fail = (words) => {
    failed.textContent = words;
    failed.hidden = !words;
  };
  const show = (line) => {
    if (line.say !== undefined) said.textContent = line.say;
    if (line.total) {
      bar.max = line.total;
      bar.value = line.done;
    } else bar.removeAttribute("value");
  };
  return {
    fail,
    /** What the work gives; null if it failed, which is said, or was cancelled. */
    async run(path, body) {
      if (stop) return fail("Other work goes on: cancel it, or wait for it.") ?? null;
      stop = new AbortController();
      fail("");
      show({ say: "Asking the server" });
      box.hidden = false;
      try {
        for await (const line of linesOf(await send(path, body, "POST", stop.signal))) {
          if (line.error) throw new Error(line.error);
          if (line.result) return line.result;
          show(line);
        }
        throw new Error("The server stopped before the work was done.");
      } catch (error) {
        fail(error.name === "AbortError" ? "Cancelled." : error.message);
        return null;
      } finally {
        box.hidden = true;
        stop = null;
      }
    },
  };
}
