// OpenAI's Node SDK through the local proxy: only the base URL is ours.
import OpenAI from "openai";

const { VOUCHSAFE_PROXY = "http://127.0.0.1:8080", VOUCHSAFE_API_KEY, VOUCHSAFE_MODEL } = process.env;
const question = process.argv.slice(2).join(" ") || "What can the host see?";
const client = new OpenAI({ baseURL: `${VOUCHSAFE_PROXY}/v1`, apiKey: VOUCHSAFE_API_KEY });

try {
  const stream = await client.chat.completions.create({
    model: VOUCHSAFE_MODEL,
    messages: [{ role: "user", content: question }],
    temperature: 0,
    stream: true,
  });
  for await (const event of stream) process.stdout.write(event.choices[0]?.delta?.content ?? "");
  console.log();
} catch (error) {
  console.error(`error: ${error.message}`); // the proxy's own errors come in OpenAI's shape, refusals included
  process.exitCode = 1;
}
