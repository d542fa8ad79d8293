// Generates with fetch, in Node 18 or later; prints the text: node fetch.mjs [URL [MODEL [PROMPT]]]
// A web page may ask too, if the server was started with --rest_api_enable_cors_support.

const [url = "http://localhost:8501", model = "quickstart", prompt = "The import statement"] = process.argv.slice(2);

const reply = await fetch(`${url}/v1/models/${model}:predict`, {
  method: "POST",
  // A row has to contain every input, because REST ignores defaults.
  body: JSON.stringify({
    signature_name: "generate",
    instances: [
      {
        prompt,
        max_new_tokens: 20,
        temperature: 0.8,
        top_k: 50,
        top_p: 0.95,
        repetition_penalty: 1.0,
        seed: 7,
        stop: "",
      },
    ],
  }),
  signal: AbortSignal.timeout(120_000),
});
if (!reply.ok) {
  console.error(`HTTP ${reply.status}: ${await reply.text()}`);
  process.exit(1);
}
console.log((await reply.json()).predictions[0].generated_text);
